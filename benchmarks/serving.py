"""python -m benchmarks.serving [--quick]: what a distilled student costs where it is served, beside one that learnt from labels alone.

Trains the demo's student `feed` without Ray, exports both arms, and asks ONNX Runtime (one thread) for 1, 100 and 1,000 candidates.
The graphs are the same, so the ratio of the medians has to be 1 within noise: the calls of both, and of a second session of the
labels arm as a control, are interleaved in changing order. Sizes are of folders on disk; the delta is that of one more window.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from benchmarks.common import arguments, bar, report
from exfm_ray.config import Config, load_config
from exfm_ray.das.run import DAS
from exfm_ray.data.batch import to_batch
from exfm_ray.data.prepare import prepare
from exfm_ray.data.stream import EventStream
from exfm_ray.serving.export import export_student
from exfm_ray.serving.graph import inputs_of
from exfm_ray.serving.program import ONNX, onnx_session
from exfm_ray.training.job import Job, Worker
from exfm_ray.training.local import KeptRows, LocalClient, one_process

SAYS = "Trains, exports and times served students on the embedded stream: about 4 minutes on two cores (--quick: 1)."
CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
CANDIDATES = (1, 100, 1_000)
LABELS, DISTILLED, CONTROL = "labels", "ah_sa", "labels again"
NOISE = 0.05
ROUNDS = 20
Inputs = dict[str, np.ndarray[Any, Any]]


def config(folder: str, quick: bool) -> Config:
    """The demo's models; one student in two arms."""
    windows, events = (4, 10_000) if quick else (8, 40_000)
    overrides = [f"run.dir={folder}", f"data.embedded.windows={windows}", f"data.embedded.events_per_window={events}"]
    overrides += ["vm.models=[{name: feed, domain: feed, task: click}]", f"vm.arms=[{LABELS}, {DISTILLED}]"]
    return load_config(CONFIG, overrides)


def train(job: Job, windows: Sequence[int]) -> None:
    """The job up to the end of `windows`, from its latest checkpoint on."""
    done = job.checkpoints.latest()
    worker = Worker(job, None, KeptRows(), torch.device("cpu"))
    worker.loop.client = LocalClient(worker.loop.reader, job.passes(windows, done))  # type: ignore[assignment]
    worker.run(windows, done)


def supervise(settings: Config, stream: EventStream) -> None:
    """Let the DAS score all windows that have a teacher, here."""
    DAS(settings, stream).run_here(stream.windows())


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def candidates(stream: EventStream, count: int) -> Inputs:
    """Rows of the last window as the graph's inputs."""
    window = stream.windows()[-1]
    batch = to_batch(stream.read(window, stream.window(window).fragments[0]).slice(0, count), stream.schema)
    return {name: tensor.numpy() for name, tensor in inputs_of(stream.schema, batch).items()}


def latency(graphs: Mapping[str, Path], inputs: Inputs, calls: int) -> dict[str, Any]:
    """Milliseconds of each graph's calls, and ratios of their medians to the labels arm's. The sessions are opened anew in each round, in another
    order, for where their memory happens to lie is worth a few percent for as long as they live."""
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    order, rng = list(graphs), random.Random(0)
    for _ in range(ROUNDS):
        rng.shuffle(order)
        sessions = {name: onnx_session(graphs[name]) for name in order}
        for call in range(-calls // 10 // ROUNDS, calls // ROUNDS):
            rng.shuffle(order)
            for name in order:
                started = time.perf_counter()
                sessions[name].run(None, inputs)
                if call >= 0:
                    taken[name].append(1e3 * (time.perf_counter() - started))
    p50 = {name: float(np.median(ms)) for name, ms in taken.items()}
    figures: dict[str, Any] = {name: {"p50_ms": p50[name], "p99_ms": float(np.quantile(ms, 0.99))} for name, ms in taken.items()}
    return {**figures, "ratio": p50[DISTILLED] / p50[LABELS], "control": p50[CONTROL] / p50[LABELS]}


def main() -> None:
    options = arguments("serving", SAYS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = config(folder, options.quick)
        stream, run = prepare(settings), settings.folder
        windows = stream.windows()
        one_process()
        train(Job("fm", settings), windows)
        supervise(settings, stream)
        job = Job("vm", settings, settings.vm.models)
        train(job, windows[:-1])
        before = export_student(run, "feed", DISTILLED, run / "before")
        train(job, windows)
        served = {arm: export_student(run, "feed", arm) for arm in (LABELS, DISTILLED)}
        delta = export_student(run, "feed", DISTILLED, since=before)
        sizes = {**{arm: size(path) for arm, path in served.items()}, "delta": size(delta)}
        figures: dict[str, Any] = {"bytes": sizes, "delta_over_full": sizes["delta"] / sizes[DISTILLED]}
        print(f"bytes: {sizes}; the delta is {figures['delta_over_full']:.1%} of the full export", flush=True)
        graphs = {name: served[name.split()[0]] / ONNX for name in (LABELS, DISTILLED, CONTROL)}
        bars = {}
        for count in CANDIDATES:
            told = latency(graphs, candidates(stream, count), 500 if options.quick else 3_000)
            figures[f"candidates_{count}"] = told
            own = told[DISTILLED]
            print(
                f"{count:,} candidates: p50 {own['p50_ms']:.3f} ms, p99 {own['p99_ms']:.3f} ms; over labels {told['ratio']:.3f}, "
                f"labels over itself {told['control']:.3f}", flush=True,
            )  # fmt: skip
            bars[f"latency_over_labels_{count}"] = bar(told["ratio"], 1 + NOISE, at_least=False)
        report("serving", figures, bars)


if __name__ == "__main__":
    main()
