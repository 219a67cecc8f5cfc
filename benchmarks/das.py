"""python -m benchmarks.das [--quick]: what the DAS costs, and what it saves.

On the synthetic stream with the demo's FM, one torch thread in each process; all ratios are medians
over interleaved repetitions:
1. one scorer actor, reading and writing included, against the bare forward pass over the same
   batches in memory;
2. two actors against one, and for comparison what the machine allows: the bare forward pass in two
   processes against one;
3. windows scored by a new snapshot each, against the same windows scored by one snapshot;
4. bytes of supervision on disk for each example and task;
5. ten clients that request the same windows against one;
6. seconds and FLOPs to train S = 1, 2, 4, 8 vertical models: see `benchmarks.das_saving`.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
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
from exfm_ray.data.batch import Batch, to_batch
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream, Fragment
from exfm_ray.runtime.session import ray_session
from exfm_ray.storage.atomic import read_jsonl

DESCRIPTION = (
    "Times the DAS on the synthetic stream, then trains vertical models with and without it: "
    "about 10 minutes on two cores (--quick: 3)."
)
CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
WINDOWS = 8
LEARNED = 4
"""Windows that the FM learns. The windows after them are scored."""
CLIENTS = 10
Task = tuple[int, Fragment, int]
"""Window, fragment and version of the snapshot that scores it."""


def settings_in(folder: str, quick: bool) -> Config:
    """Return the demo's config with fewer, larger windows."""
    events = 20_000 if quick else 100_000
    overrides = [
        f"run.dir={folder}",
        f"data.synthetic.windows={WINDOWS}",
        f"data.synthetic.events_per_window={events}",
        "data.fragment_rows=10000",
        "das.threads=1",
        "fm.threads=1",
        "vm.threads=1",
        "das.keep_snapshots=true",
    ]
    return load_config(CONFIG, overrides, "das")


def score(actors: Sequence[Any], tasks: Sequence[Task]) -> float:
    """Score fragments, `MAX_IN_FLIGHT` at a time by each actor as the pool does; seconds."""
    waiting = deque(tasks)
    running: dict[Any, int] = {}
    started = time.perf_counter()
    while waiting or running:
        in_flight = Counter(running.values())
        for number, actor in enumerate(actors):
            while waiting and in_flight[number] < MAX_IN_FLIGHT:
                window, fragment, version = waiting.popleft()
                running[actor.score.remote(window, fragment, version)] = number
                in_flight[number] += 1
        ready, _ = ray.wait(list(running))
        ray.get(ready)
        for ref in ready:
            del running[ref]
    return time.perf_counter() - started


def tasks_of(
    spec: LabelingSpec,
    stream: EventStream,
    windows: Sequence[int],
    versions: Sequence[int],
) -> list[Task]:
    """Return the fragments of windows as tasks, and delete their supervision."""
    tasks = []
    for window, version in zip(windows, versions, strict=True):
        for fragment in stream.window(window).fragments:
            spec.store.path(window, fragment).unlink(missing_ok=True)
            tasks.append((window, fragment, version))
    return tasks


class Bare:
    """The forward pass alone, over the batches of a window, in a process of its own."""

    def __init__(self, spec: LabelingSpec, window: int) -> None:
        torch.set_num_threads(1)
        stream = EventStream.open(spec.stream_root)
        self._model, _ = spec.snapshots.load(1, stream.schema.digest)
        self._batches: list[Batch] = []
        for fragment in stream.window(window).fragments:
            rows = to_batch(stream.read(window, fragment), stream.schema)
            self._batches += rows.split(spec.das.batch_size)

    def score(self) -> None:
        """Score all batches."""
        for batch in self._batches:
            self._model.score(batch)


def seconds_of(actors: Sequence[Any]) -> float:
    """Let actors of `Bare` score all their batches; seconds until the last one ends."""
    started = time.perf_counter()
    ray.get([actor.score.remote() for actor in actors])
    return time.perf_counter() - started


def actors(spec: LabelingSpec, quick: bool) -> dict[str, Any]:
    """Compare an actor with the bare forward pass, two actors with one, rollovers with none."""
    stream = EventStream.open(spec.stream_root)
    windows = list(range(LEARNED, WINDOWS))
    repetitions = 3 if quick else 7
    bare = [ray.remote(Bare).remote(spec, windows[0]) for _ in range(2)]
    one = ScorerActor.remote(spec)
    two = ScorerActor.remote(spec)
    rounds = []
    for _ in range(repetitions + 1):
        ray.get([actor.load_snapshot.remote(1) for actor in (one, two)])
        same_snapshot = [1] * len(windows)
        first_window = tasks_of(spec, stream, windows[:1], [1])
        one_round = {
            "forward": seconds_of(bare[:1]),
            "forward_two": seconds_of(bare) / 2,
            "one": score([one], first_window),
            "same": score([one], tasks_of(spec, stream, windows, same_snapshot)),
            "two": score([one, two], tasks_of(spec, stream, windows, same_snapshot)),
            "rolling": score([one], tasks_of(spec, stream, windows, range(1, LEARNED + 1))),
        }
        rounds.append(one_round)
    del rounds[0]  # it warms up
    for actor in (one, two, *bare):
        ray.kill(actor)
    return actor_figures(rounds, stream.window(windows[0]).rows, len(windows))


def actor_figures(
    rounds: Sequence[Mapping[str, float]],
    rows: int,
    windows: int,
) -> dict[str, float]:
    """Return medians over the rounds.

    Args:
        rounds: seconds of each measurement.
        rows: rows of the first window.
        windows: number of windows that are scored by `same` and `rolling`.
    """

    def median(ratio: Callable[[Mapping[str, float]], float]) -> float:
        return statistics.median(ratio(one_round) for one_round in rounds)

    def rollover(one_round: Mapping[str, float]) -> float:
        """Seconds of a rollover over those of a window."""
        slower = one_round["rolling"] / one_round["same"] - 1
        return slower * windows / (LEARNED - 1)

    return {
        "forward_examples_per_s": rows / median(lambda seconds: seconds["forward"]),
        "actor_examples_per_s": rows / median(lambda seconds: seconds["one"]),
        "actor_over_forward": median(lambda seconds: seconds["forward"] / seconds["one"]),
        "two_processes_over_one": median(
            lambda seconds: seconds["forward"] / seconds["forward_two"]
        ),
        "two_actors_over_one": median(lambda seconds: seconds["same"] / seconds["two"]),
        "rollover_of_a_window": median(rollover),
    }


def clients(spec: LabelingSpec) -> dict[str, float]:
    """Compare the service's seconds and examples for ten clients with those for one."""
    windows = EventStream.open(spec.stream_root).windows()[:LEARNED]
    seconds = []
    examples = []
    for number in (1, CLIENTS):
        root = spec.store.root.with_name(f"for-{number}")
        own_store = replace(spec.store, root=root)
        own_spec = replace(spec, store=own_store, log=spec.log.with_name(f"{number}.jsonl"))
        with ThreadPoolExecutor(number) as pool:
            requests = [
                pool.submit(label, own_spec, windows, no_progress, no_watch) for _ in range(number)
            ]
            for request in requests:
                request.result()
        spans = read_jsonl(own_spec.log)
        busy = [span["ended_s"] - span["started_s"] - span["waited_s"] for span in spans]
        seconds.append(sum(busy))
        examples.append(sum(span["examples"] for span in spans))
    return {
        "clients": CLIENTS,
        "examples": examples[1] / examples[0],
        "seconds": seconds[1] / seconds[0],
    }


def no_progress(window: int, rows: int) -> None:
    """Ignore the progress of labeling."""


def no_watch() -> None:
    """Never end the wait for labels."""


def supervision_bytes(spec: LabelingSpec, tasks: int) -> float:
    """Return the bytes on disk for each example and task, of the windows from LEARNED on."""
    stream = EventStream.open(spec.stream_root)
    total_bytes = 0
    rows = 0
    for window in range(LEARNED, WINDOWS):
        for fragment in stream.window(window).fragments:
            total_bytes += spec.store.path(window, fragment).stat().st_size
            rows += fragment.rows
    return total_bytes / rows / tasks


def main() -> None:
    options = arguments("benchmarks.das", DESCRIPTION)
    quick = options.quick
    torch.set_num_threads(1)
    learned = list(range(LEARNED))
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_in(folder, quick)
        stream = prepare(settings)
        train_fm(settings, learned)
        spec = LabelingSpec.from_config(settings)
        with ray_session(settings):
            figures: dict[str, Any] = actors(spec, quick)
            figures["clients"] = clients(spec)
        tasks = len(stream.schema.tasks)
        figures["bytes_per_example_and_task"] = supervision_bytes(spec, tasks)
        figures["saving"] = saving(settings, learned, quick)

    most = str(max(int(models) for models in figures["saving"]))
    seconds_saved = figures["saving"][most]["seconds_saved"]
    bytes_per_task = figures["bytes_per_example_and_task"]
    ten_over_one = figures["clients"]["examples"]
    bars = {
        "actor_over_forward": bar(figures["actor_over_forward"], 0.95),
        "two_actors_over_one": bar(figures["two_actors_over_one"], 1.8),
        "rollover_of_a_window": bar(figures["rollover_of_a_window"], 0.05, at_least=False),
        "bytes_per_example_and_task": bar(bytes_per_task, 8.0, at_least=False),
        "ten_clients_examples_over_one": bar(ten_over_one, 1.0, at_least=False),
        f"seconds_saved_with_{most}_models": bar(seconds_saved, 0.0),
    }
    report("das", figures, bars)


if __name__ == "__main__":
    main()
