"""python -m benchmarks.overhead [--quick]: what Ray, the DAS and distillation cost.

On the synthetic stream, all with one torch thread:
1. FM: examples/s of a job in Ray Train fed by Ray Data, against the same loop, model, optimizers
   and files in one process without Ray; both without the first window (start-up).
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
from collections import defaultdict, deque
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
from exfm_ray.data.batch import Batch, to_batch
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream, Fragment
from exfm_ray.models.serialization import LocalModel
from exfm_ray.runtime.session import ray_session
from exfm_ray.tracking.recorder import RecorderActor
from exfm_ray.training.checkpoint import Cursor, JobResult
from exfm_ray.training.job import Job
from exfm_ray.training.launch import run_job, start_feed
from exfm_ray.training.local import local_loop
from exfm_ray.training.loop import Timing

DESCRIPTION = (
    "Times FM, DAS and VMs with and without Ray on the synthetic stream: "
    "about 5 minutes on two cores (--quick: 2)."
)
ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"
WINDOWS = 3
BATCH_SIZES = (256, 1024, 4096)


def config(
    folder: str,
    name: str,
    quick: bool,
) -> Config:
    """Return the demo's config with fewer, larger windows."""
    events = 50_000 if quick else 200_000
    overrides = [
        f"run.dir={folder}",
        f"data.synthetic.windows={WINDOWS}",
        f"data.synthetic.events_per_window={events}",
    ]
    return load_config(CONFIG, overrides, name)


def windows_of(settings: Config) -> list[int]:
    """Return the windows of the run's stream."""
    return EventStream.open(settings.folder / "stream").windows()


def busy_seconds(timings: Sequence[Timing]) -> float:
    """Return the seconds of evaluating and learning."""
    return sum(timing.evaluate_s + timing.learn_s for timing in timings)


def speed(timings: Sequence[Timing]) -> float:
    """Return the examples evaluated and learned per second, without the first window."""
    examples = sum(timing.examples for timing in timings[1:])
    return examples / busy_seconds(timings[1:])


def in_ray(settings: Config) -> JobResult:
    """Run the FM's job under Ray Train."""
    job = Job("fm", settings)
    windows = windows_of(settings)
    recorder = RecorderActor.remote(settings.folder / "metrics.jsonl")
    run_job(job, windows, recorder, start_feed(job, windows))
    return job.checkpoints.result(Cursor(len(windows)))


def bare(settings: Config) -> list[Timing]:
    """Run the FM's loop in a process of its own without Ray."""
    arguments = f"{str(settings.run.dir)!r}, {settings.name!r}"
    code = f"from benchmarks.overhead import print_bare; print_bare({arguments})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    last_line = done.stdout.splitlines()[-1]
    return [Timing(**timing) for timing in json.loads(last_line)]


def print_bare(folder: str, name: str) -> None:
    """Run the FM's loop and print its timings; called in the process that `bare` starts."""
    torch.set_num_threads(1)
    settings = load_config(Path(folder) / name / "config.yaml")
    windows = windows_of(settings)
    loop, _ = local_loop(Job("fm", settings), windows)
    for window in windows:
        loop.run(window)
    print(json.dumps([timing._asdict() for timing in loop.timings]))


def fm(folder: str, quick: bool) -> dict[str, Any]:
    """Run pairs of a bare and a Ray job."""
    bare_speeds = []
    ray_speeds = []
    for repetition in range(1 if quick else 3):
        settings = config(folder, f"fm{repetition}", quick)
        prepare(settings)
        (settings.folder / "config.yaml").write_text(dump_config(settings))
        bare_speeds.append(speed(bare(settings)))
        with ray_session(settings):
            timings = in_ray(settings).timings
        ray_speeds.append(speed(timings))

        waits = [timing.evaluate_wait_s + timing.learn_wait_s for timing in timings[1:]]
        waiting = sum(waits) / busy_seconds(timings[1:])
        print(
            f"fm {repetition}: bare {bare_speeds[-1]:,.0f} examples/s, Ray {ray_speeds[-1]:,.0f}; "
            f"waiting for data {waiting:.1%}",
            flush=True,
        )
    ratios = [in_ray / alone for alone, in_ray in zip(bare_speeds, ray_speeds, strict=True)]
    return {
        "bare_examples_per_s": statistics.median(bare_speeds),
        "ray_examples_per_s": statistics.median(ray_speeds),
        "ratio": statistics.median(ratios),
        "waiting_for_data": waiting,
    }


def no_progress(window: int, rows: int) -> None:
    """Ignore the progress of labeling."""


def no_watch() -> None:
    """Never end the wait for labels."""


def supervise(settings: Config) -> Labeler:
    """Let the DAS score all windows that have a teacher."""
    stream = EventStream.open(settings.folder / "stream")
    labeler = Labeler(settings, stream)
    labeler.run(stream.windows(), no_progress, no_watch)
    return labeler


def das(folder: str, quick: bool) -> dict[str, Any]:
    """Compare an actor with the forward pass over the same rows in this process."""
    settings = config(folder, "fm0", quick)
    stream = EventStream.open(settings.folder / "stream")
    labeler = Labeler(settings, stream)
    window = stream.windows()[-1]
    fragments = stream.window(window).fragments
    model, _ = labeler.snapshots.load(window, stream.schema.digest)
    batches: list[Batch] = []
    for fragment in fragments:
        rows_of_fragment = to_batch(stream.read(window, fragment), stream.schema)
        batches += rows_of_fragment.split(settings.das.batch_size)
    rows = sum(len(batch) for batch in batches)

    one_thread = settings.das.model_copy(update={"threads": 1})
    actor = ScorerActor.remote(replace(labeler.spec, das=one_thread))
    ray.get(actor.load_snapshot.remote(window))
    forward_speeds = []
    actor_speeds = []
    for _ in range(4 if quick else 10):
        forward_speeds.append(rows / score_bare(model, batches))
        for fragment in fragments:
            labeler.store.path(window, fragment).unlink(missing_ok=True)
        actor_speeds.append(rows / score_all(actor, window, fragments))
    del forward_speeds[0], actor_speeds[0]  # they warm up

    ratios = [scored / alone for alone, scored in zip(forward_speeds, actor_speeds, strict=True)]
    forward = statistics.median(forward_speeds)
    scored = statistics.median(actor_speeds)
    ratio = statistics.median(ratios)
    print(
        f"das: bare forward {forward:,.0f} examples/s, actor {scored:,.0f}, ratio {ratio:.3f}",
        flush=True,
    )
    return {"forward_examples_per_s": forward, "actor_examples_per_s": scored, "ratio": ratio}


def score_bare(model: LocalModel, batches: Sequence[Batch]) -> float:
    """Score batches in memory; seconds."""
    started = time.perf_counter()
    for batch in batches:
        model.score(batch)
    return time.perf_counter() - started


def score_all(
    actor: Any,
    window: int,
    fragments: Sequence[Fragment],
) -> float:
    """Score a window, `MAX_IN_FLIGHT` fragments at a time as the pool does; seconds."""
    started = time.perf_counter()
    waiting = deque(fragments)
    running: list[Any] = []
    while waiting or running:
        while waiting and len(running) < MAX_IN_FLIGHT:
            running.append(actor.score.remote(window, waiting.popleft(), window))
        ready, running = ray.wait(running)
        ray.get(ready)
    return time.perf_counter() - started


def vm(settings: Config, batch_size: int) -> dict[str, Any]:
    """Compare each arm's seconds per example with the labels arm's, in windows with supervision.

    Figures are medians over VMs and windows.
    """
    vm_config = settings.vm.model_copy(update={"batch_size": batch_size})
    settings = settings.model_copy(update={"vm": vm_config})
    windows = windows_of(settings)
    loop, report = local_loop(Job("vm", settings, settings.vm.models), windows)
    for window in windows:
        loop.run(window)

    speeds: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for row in report.rows:
        if row["window"] > 0:
            speeds[row["arm"]][row["model"], row["window"]] = row["examples_per_s"]
    labels_speeds = speeds[str(LABELS)]
    figures = {}
    for arm in ALL_OBJECTIVES:
        arm_speeds = speeds[str(arm)]
        slower = [labels_speeds[key] / arm_speed - 1 for key, arm_speed in arm_speeds.items()]
        figures[str(arm)] = {
            "examples_per_s": statistics.median(arm_speeds.values()),
            "slower": statistics.median(slower),
        }
    parts = [
        f"{arm} {of_arm['examples_per_s']:,.0f}/s ({of_arm['slower']:+.1%})"
        for arm, of_arm in figures.items()
    ]
    print(f"vm, batch {batch_size}: {', '.join(parts)}", flush=True)
    return figures


def main() -> None:
    options = arguments("benchmarks.overhead", DESCRIPTION)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = config(folder, "fm0", options.quick)
        figures: dict[str, Any] = {"fm": fm(folder, options.quick)}
        with ray_session(settings):
            labeler = supervise(settings)
            figures["das"] = das(folder, options.quick)
            last_window = labeler.stream.windows()[-1]
            labeler.run([last_window], no_progress, no_watch)
        figures["vm"] = {size: vm(settings, size) for size in BATCH_SIZES}

    slower = figures["vm"][1024]["ah_sa"]["slower"]
    bars = {
        "fm_ray_over_bare": bar(figures["fm"]["ratio"], 0.9),
        "das_actor_over_forward": bar(figures["das"]["ratio"], 0.9),
        "vm_ah_sa_slower_than_labels": bar(slower, 0.1, at_least=False),
    }
    report("overhead", figures, bars)


if __name__ == "__main__":
    main()
