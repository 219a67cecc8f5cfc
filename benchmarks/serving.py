"""python -m benchmarks.serving [--quick]: what a distilled student costs where it is served.

It is compared with a student that learned from labels alone. Trains the demo's student `feed`
without Ray, exports both arms, and calls ONNX Runtime (one thread) for 1, 100 and 1,000 candidates.
The graphs are the same, so the ratio of the medians must be 1 within noise: the calls of both, and
of a second session of the labels arm as a control, are interleaved in changing order. Sizes are of
folders on disk; the delta is that of one more window. The cost of arms with options is in
studies/shared_tables/serving.py.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from safetensors.numpy import load_file

from benchmarks.common import arguments, bar, report
from exfm_ray.config.load import load_config
from exfm_ray.config.root import Config
from exfm_ray.das.labeler import Labeler
from exfm_ray.data.batch import to_batch
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream
from exfm_ray.serving.export import export_student
from exfm_ray.serving.folder import SCHEMA
from exfm_ray.serving.graph import inputs_of
from exfm_ray.serving.program import ONNX, onnx_session
from exfm_ray.storage.atomic import read_json
from exfm_ray.training.job import Job
from exfm_ray.training.local import InMemoryReport, LocalClient, init_single_process
from exfm_ray.training.worker import Worker

DESCRIPTION = (
    "Trains, exports and times served students on the synthetic stream: "
    "about 4 minutes on two cores (--quick: 1)."
)
CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
CANDIDATES = (1, 100, 1_000)
LABELS = "labels"
DISTILLED = "ah_sa"
CONTROL = "labels again"
NOISE = 0.05
ROUNDS = 20
Inputs = dict[str, np.ndarray[Any, Any]]
"""Name of an input of the graph -> its values."""
Ask = Callable[[], object]
"""One call of a served student."""


def config(folder: str, quick: bool) -> Config:
    """Return the demo's config with one student in two arms."""
    windows, events = (4, 10_000) if quick else (8, 40_000)
    overrides = [
        f"run.dir={folder}",
        f"data.synthetic.windows={windows}",
        f"data.synthetic.events_per_window={events}",
        "vm.models=[{name: feed, domain: feed, task: click}]",
        f"vm.arms=[{LABELS}, {DISTILLED}]",
    ]
    return load_config(CONFIG, overrides)


def train(job: Job, windows: Sequence[int]) -> list[dict[str, Any]]:
    """Train the job up to the end of `windows`, from its latest checkpoint on.

    Returns:
        Its rows of metrics.
    """
    done = job.checkpoints.latest()
    report = InMemoryReport()
    worker = Worker(job, None, report, torch.device("cpu"))
    client: Any = LocalClient(worker.loop.reader, job.passes(windows, done))
    worker.loop.client = client
    worker.run(windows, done)
    return report.rows


def supervise(settings: Config, stream: EventStream) -> None:
    """Let the DAS score all windows that have a teacher, in this process."""
    Labeler(settings, stream).label_locally(stream.windows())


def size(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def candidates(stream: EventStream, count: int) -> Inputs:
    """Return rows of the last window as the graph's inputs."""
    window = stream.windows()[-1]
    table = stream.read(window, stream.window(window).fragments[0])
    batch = to_batch(table.slice(0, count), stream.schema)
    tensors = inputs_of(stream.schema, batch)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def asking(served: Path, inputs: Inputs) -> Ask:
    """Return a call of a served student with a user's candidates.

    Where there is a feature store, the call looks the user up once for all candidates.
    """
    session = onnx_session(served / ONNX)
    schema = read_json(served / SCHEMA)
    history = schema.get("history")
    if not history:
        return lambda: session.run(None, inputs)

    store = load_file(served / history["file"])
    users_U = store["users"]
    features_UF = store["inputs"]
    names = [feature["name"] for feature in schema["sparse_BS"]]
    column = names.index(history["key"])
    count = len(inputs["sparse_BS"])

    def ask() -> object:
        user = inputs["sparse_BS"][0, column]
        position = min(int(np.searchsorted(users_U, user)), len(users_U) - 1)
        features_F = features_UF[position]
        if users_U[position] != user:
            features_F = np.zeros_like(features_F)
        features_BF = np.broadcast_to(features_F, (count, len(features_F)))
        dense_BD = np.concatenate([inputs["dense_BD"], features_BF], axis=1)
        return session.run(None, inputs | {"dense_BD": dense_BD})

    return ask


def latency(
    served: Mapping[str, Path],
    inputs: Inputs,
    calls: int,
) -> dict[str, Any]:
    """Time the calls of each served student.

    The sessions are opened again in each round, in another order, because the position of their
    memory changes times by a few percent for as long as they live.

    Returns:
        Name -> milliseconds (median and 99th percentile), and the ratio of the median to that of
        the labels arm.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in served}
    names = list(served)
    rng = random.Random(0)
    for _ in range(ROUNDS):
        rng.shuffle(names)
        asks = {name: asking(served[name], inputs) for name in names}
        warmup = calls // 10 // ROUNDS
        for call in range(-warmup, calls // ROUNDS):
            rng.shuffle(names)
            for name in names:
                started = time.perf_counter()
                asks[name]()
                if call >= 0:
                    milliseconds[name].append(1e3 * (time.perf_counter() - started))

    p50 = {name: float(np.median(times)) for name, times in milliseconds.items()}
    return {
        name: {
            "p50_ms": p50[name],
            "p99_ms": float(np.quantile(times, 0.99)),
            "ratio": p50[name] / p50[LABELS],
        }
        for name, times in milliseconds.items()
    }


def with_control(served: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Add a copy of the labels arm.

    It must be a copy: sessions of one folder map the same tables into memory, and each finds in the
    caches what the other has read.
    """
    return {**served, CONTROL: shutil.copytree(served[LABELS], folder / "control")}


def calls(quick: bool) -> int:
    """Return how many calls are timed."""
    return 500 if quick else 3_000


def export_both(settings: Config, stream: EventStream) -> tuple[dict[str, Path], Path]:
    """Train and export both arms.

    Returns:
        Arm -> folder of its export, and the folder of the distilled arm's delta of one window.
    """
    run = settings.folder
    windows = stream.windows()
    train(Job("fm", settings), windows)
    supervise(settings, stream)
    job = Job("vm", settings, settings.vm.models)
    train(job, windows[:-1])
    before = export_student(run, "feed", DISTILLED, run / "before")
    train(job, windows)
    served = {arm: export_student(run, "feed", arm) for arm in (LABELS, DISTILLED)}
    delta = export_student(run, "feed", DISTILLED, since=before)
    return served, delta


def main() -> None:
    options = arguments("benchmarks.serving", DESCRIPTION)
    torch.set_num_threads(1)
    init_single_process()
    bars = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = config(folder, options.quick)
        stream = prepare(settings)
        served, delta = export_both(settings, stream)
        sizes = {arm: size(path) for arm, path in served.items()}
        sizes["delta"] = size(delta)
        over_full = sizes["delta"] / sizes[DISTILLED]
        print(f"bytes: {sizes}; the delta is {over_full:.1%} of the full export", flush=True)
        figures: dict[str, Any] = {"bytes": sizes, "delta_over_full": over_full}

        folders = with_control(served, settings.folder)
        for count in CANDIDATES:
            times = latency(folders, candidates(stream, count), calls(options.quick))
            distilled = times[DISTILLED]
            control = times[CONTROL]["ratio"]
            figures[f"candidates_{count}"] = {
                **times,
                "ratio": distilled["ratio"],
                "control": control,
            }
            print(
                f"{count:,} candidates: p50 {distilled['p50_ms']:.3f} ms, "
                f"p99 {distilled['p99_ms']:.3f} ms; over labels {distilled['ratio']:.3f}, "
                f"labels over itself {control:.3f}",
                flush=True,
            )
            limit = 1 + NOISE
            bars[f"latency_over_labels_{count}"] = bar(distilled["ratio"], limit, at_least=False)
    report("serving", figures, bars)


if __name__ == "__main__":
    main()
