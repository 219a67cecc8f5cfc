"""python -m benchmarks.overhead [--quick]: what Ray, the DAS and distillation cost beside the bare
computation.

On the synthetic stream, all with one torch thread:
1. FM: examples/s of a job in Ray Train fed by Ray Data, against the same loop, model, optimizers
   and files in one process without Ray; the first window (start-up) is left out of both.
2. DAS: examples/s of one scorer actor, reading and writing included, against the bare forward pass
   on tensors in memory.
3. VM: seconds per example of each arm against the labels arm, in one pass over the same batches.
Each ratio is the median over paired repetitions in this one run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import ray
import torch

from benchmarks.common import arguments, bar, report
from exfm_ray.config.arms import ALL_OBJECTIVES, LABELS
from exfm_ray.config.load import dump_config, load_config
from exfm_ray.config.root import Config
from exfm_ray.das.labeler import Labeler
from exfm_ray.das.scorer import MAX_IN_FLIGHT, ScorerActor
from exfm_ray.data.batch import to_batch
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream, Fragment
from exfm_ray.runtime.session import ray_session
from exfm_ray.tracking.recorder import RecorderActor
from exfm_ray.training.checkpoint import Cursor, JobResult
from exfm_ray.training.job import Job
from exfm_ray.training.launch import run_job, start_feed
from exfm_ray.training.local import local_loop
from exfm_ray.training.loop import Timing

SAYS = "Times FM, DAS and VMs with and without Ray on the synthetic stream: about 5 minutes on two cores (--quick: 2)."
CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


def config(
    folder: str,
    name: str,
    quick: bool,
) -> Config:
    """The demo's models on fewer, larger windows."""
    windows, events = (3, 50_000) if quick else (3, 200_000)
    overrides = [
        f"run.dir={folder}",
        f"data.synthetic.windows={windows}",
        f"data.synthetic.events_per_window={events}",
    ]
    return load_config(CONFIG, overrides, name)


def speed(timings: list[Timing]) -> float:
    """Examples evaluated and learnt per second, without the first window."""
    return sum(t.examples for t in timings[1:]) / sum(t.evaluate_s + t.learn_s for t in timings[1:])


def in_ray(settings: Config) -> JobResult:
    """The FM's job under Ray Train."""
    job = Job("fm", settings)
    windows = EventStream.open(settings.folder / "stream").windows()
    recorder = RecorderActor.remote(settings.folder / "metrics.jsonl")
    run_job(job, windows, recorder, start_feed(job, windows))
    return job.checkpoints.result(Cursor(len(windows)))


def bare(settings: Config) -> list[Timing]:
    """The same in a process of its own without Ray."""
    code = f"from benchmarks.overhead import print_bare; print_bare({str(settings.run.dir)!r}, {settings.name!r})"
    output = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    ).stdout
    return [Timing(**t) for t in json.loads(output.splitlines()[-1])]


def print_bare(folder: str, name: str) -> None:
    """Run the FM's loop and print its timings; called in the process that `bare` starts."""
    torch.set_num_threads(1)
    settings = load_config(Path(folder) / name / "config.yaml")
    job = Job("fm", settings)
    windows = EventStream.open(settings.folder / "stream").windows()
    loop, _ = local_loop(job, windows)
    for window in windows:
        loop.run(window)
    print(json.dumps([t._asdict() for t in loop.timings]))


def fm(folder: str, quick: bool) -> dict[str, Any]:
    """Pairs of a bare and a Ray run."""
    pairs = []
    for repetition in range(1 if quick else 3):
        settings = config(folder, f"fm{repetition}", quick)
        prepare(settings)
        (settings.folder / "config.yaml").write_text(dump_config(settings))
        alone = bare(settings)
        with ray_session(settings):
            result = in_ray(settings)
        pairs.append((speed(alone), speed(result.timings)))
        waits = sum(t.evaluate_wait_s + t.learn_wait_s for t in result.timings[1:])
        took = sum(t.evaluate_s + t.learn_s for t in result.timings[1:])
        print(
            f"fm {repetition}: bare {pairs[-1][0]:,.0f} examples/s, Ray {pairs[-1][1]:,.0f}; waiting for data {waits / took:.1%}",
            flush=True,
        )
    return {
        "bare_examples_per_s": statistics.median(p[0] for p in pairs),
        "ray_examples_per_s": statistics.median(p[1] for p in pairs),
        "ratio": statistics.median(p[1] / p[0] for p in pairs),
        "waiting_for_data": waits / took,
    }


def supervise(settings: Config) -> Labeler:
    """Let the DAS score all windows that have a teacher."""
    stream = EventStream.open(settings.folder / "stream")
    service = Labeler(settings, stream)
    service.run(stream.windows(), lambda window, rows: None, lambda: None)
    return service


def das(folder: str, quick: bool) -> dict[str, Any]:
    """One actor over a window's fragments, against the model's forward pass over the same rows in
    this process."""
    settings = config(folder, "fm0", quick)
    stream = EventStream.open(settings.folder / "stream")
    service = Labeler(settings, stream)
    window = stream.windows()[-1]
    model, _ = service.snapshots.load(window, stream.schema.digest)
    fragments = stream.window(window).fragments
    size = settings.das.batch_size
    tables = [stream.read(window, f) for f in fragments]
    batches = [
        to_batch(t.slice(s, size), stream.schema)
        for t in tables
        for s in range(0, t.num_rows, size)
    ]
    rows = sum(len(b) for b in batches)
    pairs = []
    order = replace(service.spec, das=settings.das.model_copy(update={"threads": 1}))
    actor = ScorerActor.remote(order)
    ray.get(actor.take.remote(window))
    for _ in range(4 if quick else 10):
        started = time.perf_counter()
        for batch in batches:
            model.score(batch)
        alone = time.perf_counter() - started
        for fragment in fragments:
            service.store.path(window, fragment).unlink(missing_ok=True)
        started = time.perf_counter()
        score_all(actor, window, fragments)
        pairs.append((rows / alone, rows / (time.perf_counter() - started)))
    forward, scored = (
        statistics.median(speeds) for speeds in zip(*pairs[1:], strict=True)
    )  # the first pair warms up
    ratio = statistics.median(s / f for f, s in pairs[1:])
    print(
        f"das: bare forward {forward:,.0f} examples/s, actor {scored:,.0f}, ratio {ratio:.3f}",
        flush=True,
    )
    return {"forward_examples_per_s": forward, "actor_examples_per_s": scored, "ratio": ratio}


def score_all(
    actor: Any,
    window: int,
    fragments: Sequence[Fragment],
) -> None:
    """Give an actor a window's fragments as the pool does: `MAX_IN_FLIGHT` in hand at once."""
    left = list(fragments)
    running: list[Any] = []
    while left or running:
        while left and len(running) < MAX_IN_FLIGHT:
            running.append(actor.score.remote(window, left.pop(0), window))
        ready, running = ray.wait(running)
        ray.get(ready)


def vm(settings: Config, batch_size: int) -> dict[str, Any]:
    """Seconds per example of each arm over those of the labels arm, in windows with supervision:
    median over VMs and windows."""
    settings = settings.model_copy(
        update={"vm": settings.vm.model_copy(update={"batch_size": batch_size})}
    )
    windows = EventStream.open(settings.folder / "stream").windows()
    loop, report = local_loop(Job("vm", settings, settings.vm.models), windows)
    for window in windows:
        loop.run(window)
    speeds = {
        (r["model"], r["window"], r["arm"]): r["examples_per_s"]
        for r in report.rows
        if r["window"] > 0
    }
    figures = {}
    for arm in ALL_OBJECTIVES:
        slower = [speeds[m, w, LABELS] / s - 1 for (m, w, a), s in speeds.items() if a == arm]
        median = statistics.median(s for (_, _, a), s in speeds.items() if a == arm)
        figures[str(arm)] = {"examples_per_s": median, "slower": statistics.median(slower)}
    print(
        f"vm, batch {batch_size}: "
        + ", ".join(
            f"{a} {f['examples_per_s']:,.0f}/s ({f['slower']:+.1%})" for a, f in figures.items()
        ),
        flush=True,
    )
    return figures


def main() -> None:
    options = arguments("benchmarks.overhead", SAYS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = config(folder, "fm0", options.quick)
        figures: dict[str, Any] = {"fm": fm(folder, options.quick)}
        with ray_session(settings):
            service = supervise(settings)
            figures["das"] = das(folder, options.quick)
            service.run([service.stream.windows()[-1]], lambda window, rows: None, lambda: None)
        figures["vm"] = {size: vm(settings, size) for size in (256, 1024, 4096)}
        slower = figures["vm"][1024]["ah_sa"]["slower"]
        bars = {
            "fm_ray_over_bare": bar(figures["fm"]["ratio"], 0.9),
            "das_actor_over_forward": bar(figures["das"]["ratio"], 0.9),
            "vm_ah_sa_slower_than_labels": bar(slower, 0.1, at_least=False),
        }
        report("overhead", figures, bars)


if __name__ == "__main__":
    main()
