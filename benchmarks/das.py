"""python -m benchmarks.das [--quick]: what the DAS costs, and what it saves.

On the synthetic stream with the demo's FM, one torch thread in each process; all ratios are medians
over interleaved repetitions:
1. one scorer actor, reading and writing included, against the bare forward pass over the same
   batches in memory;
2. two actors against one; beside it what the machine gives: the bare forward pass in two processes
   against one;
3. windows scored by a new snapshot each, against the same windows scored by one snapshot;
4. bytes of supervision on disk for each example and task;
5. ten clients that ask for the same windows against one;
6. seconds and FLOPs to train S = 1, 2, 4, 8 vertical models: see `benchmarks.das_saving`.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import ray
import torch

from benchmarks.common import arguments, bar, report
from benchmarks.das_saving import saving, train_fm
from exfm_ray.config.load import load_config
from exfm_ray.config.root import Config
from exfm_ray.das.client import label
from exfm_ray.das.scorer import MAX_IN_FLIGHT, ScorerActor
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.data.batch import to_batch
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream, Fragment
from exfm_ray.runtime.session import ray_session
from exfm_ray.storage.atomic import read_jsonl

SAYS = "Times the DAS on the synthetic stream, then trains vertical models with and without it: about 10 minutes on two cores (--quick: 3)."
CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
WINDOWS = 8
LEARNT = 4
CLIENTS = 10
Task = tuple[int, Fragment, int]


def settings_in(folder: str, quick: bool) -> Config:
    """The demo with fewer, larger windows."""
    events = 20_000 if quick else 100_000
    overrides = [
        f"run.dir={folder}",
        f"data.synthetic.windows={WINDOWS}",
        f"data.synthetic.events_per_window={events}",
        "data.fragment_rows=10000",
    ]
    return load_config(
        CONFIG,
        [*overrides, "das.threads=1", "fm.threads=1", "vm.threads=1", "das.keep_snapshots=true"],
        "das",
    )


def score(actors: Sequence[Any], tasks: Sequence[Task]) -> float:
    """Seconds to score these fragments, given out as the pool does: `MAX_IN_FLIGHT` in hand of each
    actor."""
    left = list(tasks)
    running = dict[Any, Any]()
    started = time.perf_counter()
    while left or running:
        for actor in actors:
            while left and sum(other is actor for other in running.values()) < MAX_IN_FLIGHT:
                window, fragment, version = left.pop(0)
                running[actor.score.remote(window, fragment, version)] = actor
        ready, _ = ray.wait(list(running))
        ray.get(ready)
        for ref in ready:
            del running[ref]
    return time.perf_counter() - started


def tasks_of(
    order: LabelingSpec,
    stream: EventStream,
    windows: Sequence[int],
    versions: Sequence[int],
) -> list[Task]:
    """The fragments of windows, none of which is scored yet."""
    found = [
        (w, fragment, v)
        for w, v in zip(windows, versions, strict=True)
        for fragment in stream.window(w).fragments
    ]
    for window, fragment, _ in found:
        order.store.path(window, fragment).unlink(missing_ok=True)
    return found


class Bare:
    """The forward pass alone, over the batches of a window, in a process of its own."""

    def __init__(self, order: LabelingSpec, window: int) -> None:
        torch.set_num_threads(1)
        stream = EventStream.open(order.stream_root)
        self._model, _ = order.snapshots.load(1, stream.schema.digest)
        tables = [stream.read(window, fragment) for fragment in stream.window(window).fragments]
        self._batches = [
            batch
            for table in tables
            for batch in to_batch(table, stream.schema).split(order.das.batch_size)
        ]

    def score(self) -> None:
        """All of them."""
        for batch in self._batches:
            self._model.score(batch)


def seconds_of(actors: Sequence[Any]) -> float:
    """Until all of these have scored all their batches."""
    started = time.perf_counter()
    ray.get([actor.score.remote() for actor in actors])
    return time.perf_counter() - started


def actors(order: LabelingSpec, quick: bool) -> dict[str, Any]:
    """One actor against the bare forward pass, two against one, rollovers against none."""
    stream = EventStream.open(order.stream_root)
    windows = list(range(LEARNT, WINDOWS))
    repetitions = 3 if quick else 7
    bare = [ray.remote(Bare).remote(order, windows[0]) for _ in range(2)]
    one = ScorerActor.remote(order)
    two = ScorerActor.remote(order)
    told: dict[str, list[float]] = {
        "forward": [],
        "forward_two": [],
        "one": [],
        "two": [],
        "same": [],
        "rolling": [],
    }
    for _ in range(repetitions + 1):  # the first one warms up
        ray.get([actor.take.remote(1) for actor in (one, two)])
        told["forward"].append(seconds_of(bare[:1]))
        told["forward_two"].append(seconds_of(bare) / 2)
        told["one"].append(score([one], tasks_of(order, stream, windows[:1], [1])))
        told["same"].append(score([one], tasks_of(order, stream, windows, [1] * len(windows))))
        told["two"].append(score([one, two], tasks_of(order, stream, windows, [1] * len(windows))))
        told["rolling"].append(score([one], tasks_of(order, stream, windows, range(1, LEARNT + 1))))
    rounds = [
        dict(zip(told, values, strict=True))
        for values in list(zip(*told.values(), strict=True))[1:]
    ]
    rows = stream.window(windows[0]).rows
    for actor in (one, two, *bare):
        ray.kill(actor)
    return {
        "forward_examples_per_s": rows / statistics.median(r["forward"] for r in rounds),
        "actor_examples_per_s": rows / statistics.median(r["one"] for r in rounds),
        "actor_over_forward": statistics.median(r["forward"] / r["one"] for r in rounds),
        "two_processes_over_one": statistics.median(
            r["forward"] / r["forward_two"] for r in rounds
        ),
        "two_actors_over_one": statistics.median(r["same"] / r["two"] for r in rounds),
        "rollover_of_a_window": statistics.median(
            (r["rolling"] / r["same"] - 1) * len(windows) / (LEARNT - 1) for r in rounds
        ),
    }


def clients(order: LabelingSpec) -> dict[str, float]:
    """The service's seconds and examples for ten clients over those for one."""
    seconds = []
    examples = []
    stream = EventStream.open(order.stream_root)
    for number in (1, CLIENTS):
        own = replace(
            order,
            store=replace(order.store, root=order.store.root.with_name(f"for-{number}")),
            log=order.log.with_name(f"{number}.jsonl"),
        )
        with ThreadPoolExecutor(number) as pool:
            list(
                pool.map(
                    lambda _, own=own: label(
                        own, stream.windows()[:LEARNT], lambda window, rows: None, lambda: None
                    ),
                    range(number),
                )
            )
        lines = read_jsonl(own.log)
        seconds.append(
            sum(line["ended_s"] - line["started_s"] - line["waited_s"] for line in lines)
        )
        examples.append(sum(line["examples"] for line in lines))
    return {
        "clients": CLIENTS,
        "examples": examples[1] / examples[0],
        "seconds": seconds[1] / seconds[0],
    }


def supervision_bytes(order: LabelingSpec, tasks: int) -> float:
    """Bytes on disk for each example and task, of the windows from LEARNT on."""
    stream = EventStream.open(order.stream_root)
    files = [
        (order.store.path(w, fragment), fragment.rows)
        for w in range(LEARNT, WINDOWS)
        for fragment in stream.window(w).fragments
    ]
    return sum(path.stat().st_size for path, _ in files) / sum(rows for _, rows in files) / tasks


def main() -> None:
    options = arguments("benchmarks.das", SAYS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_in(folder, options.quick)
        stream = prepare(settings)
        train_fm(settings, list(range(LEARNT)))
        order = LabelingSpec.from_config(settings)
        with ray_session(settings):
            figures: dict[str, Any] = actors(order, options.quick)
            figures["clients"] = clients(order)
        figures["bytes_per_example_and_task"] = supervision_bytes(order, len(stream.schema.tasks))
        figures["saving"] = saving(settings, list(range(LEARNT)), options.quick)
    most = str(max(int(s) for s in figures["saving"]))
    bars = {
        "actor_over_forward": bar(figures["actor_over_forward"], 0.95),
        "two_actors_over_one": bar(figures["two_actors_over_one"], 1.8),
        "rollover_of_a_window": bar(figures["rollover_of_a_window"], 0.05, at_least=False),
        "bytes_per_example_and_task": bar(
            figures["bytes_per_example_and_task"], 8.0, at_least=False
        ),
        "ten_clients_examples_over_one": bar(figures["clients"]["examples"], 1.0, at_least=False),
        f"seconds_saved_with_{most}_models": bar(figures["saving"][most]["seconds_saved"], 0.0),
    }
    report("das", figures, bars)


if __name__ == "__main__":
    main()
