"""python -m benchmarks.serving [--quick]: what a distilled student costs where it is served, beside
one that learnt from labels alone.

Trains the demo's student `feed` without Ray, exports both arms, and asks ONNX Runtime (one thread)
for 1, 100 and 1,000 candidates. The graphs are the same, so the ratio of the medians has to be 1
within noise: the calls of both, and of a second session of the labels arm as a control, are
interleaved in changing order. Sizes are of folders on disk; the delta is that of one more window.
What arms with options cost beside these: benchmarks/share_serving.py.
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

SAYS = "Trains, exports and times served students on the synthetic stream: about 4 minutes on two cores (--quick: 1)."
CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
CANDIDATES = (1, 100, 1_000)
LABELS = "labels"
DISTILLED = "ah_sa"
CONTROL = "labels again"
NOISE = 0.05
ROUNDS = 20
Inputs = dict[str, np.ndarray[Any, Any]]
Ask = Callable[[], object]
"""One call of a served student."""


def config(folder: str, quick: bool) -> Config:
    """The demo's models; one student in two arms."""
    windows, events = (4, 10_000) if quick else (8, 40_000)
    overrides = [
        f"run.dir={folder}",
        f"data.synthetic.windows={windows}",
        f"data.synthetic.events_per_window={events}",
    ]
    overrides += [
        "vm.models=[{name: feed, domain: feed, task: click}]",
        f"vm.arms=[{LABELS}, {DISTILLED}]",
    ]
    return load_config(CONFIG, overrides)


def train(job: Job, windows: Sequence[int]) -> list[dict[str, Any]]:
    """The job up to the end of `windows`, from its latest checkpoint on; its rows of metrics."""
    done = job.checkpoints.latest()
    report = InMemoryReport()
    worker = Worker(job, None, report, torch.device("cpu"))
    worker.loop.client = LocalClient(worker.loop.reader, job.passes(windows, done))  # type: ignore[assignment]
    worker.run(windows, done)
    return report.rows


def supervise(settings: Config, stream: EventStream) -> None:
    """Let the DAS score all windows that have a teacher, here."""
    Labeler(settings, stream).label_locally(stream.windows())


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def candidates(stream: EventStream, count: int) -> Inputs:
    """Rows of the last window as the graph's inputs."""
    window = stream.windows()[-1]
    batch = to_batch(
        stream.read(window, stream.window(window).fragments[0]).slice(0, count), stream.schema
    )
    return {name: tensor.numpy() for name, tensor in inputs_of(stream.schema, batch).items()}


def asking(served: Path, inputs: Inputs) -> Ask:
    """A call of a served student with a user's candidates; one with a feature store looks the user
    up first, once for all of them."""
    session = onnx_session(served / ONNX)
    history = read_json(served / SCHEMA).get("history")
    if not history:
        return lambda: session.run(None, inputs)
    store = load_file(served / history["file"])
    count = len(inputs["sparse_BS"])
    users_U = store["users"]
    past_UF = store["inputs"]
    column = [feature["name"] for feature in read_json(served / SCHEMA)["sparse_BS"]].index(
        history["key"]
    )

    def ask() -> object:
        user = inputs["sparse_BS"][0, column]
        at = min(int(np.searchsorted(users_U, user)), len(users_U) - 1)
        past_F = past_UF[at] if users_U[at] == user else np.zeros_like(past_UF[0])
        dense_BD = np.concatenate(
            [inputs["dense_BD"], np.broadcast_to(past_F, (count, len(past_F)))], axis=1
        )
        return session.run(None, inputs | {"dense_BD": dense_BD})

    return ask


def latency(
    served: Mapping[str, Path],
    inputs: Inputs,
    calls: int,
) -> dict[str, Any]:
    """Milliseconds of each served student's calls, and the ratio of its median to the labels arm's.
    The sessions are opened anew in each round, in another order, for where their memory happens to
    lie is worth a few percent for as long as they live."""
    taken: dict[str, list[float]] = {name: [] for name in served}
    order = list(served)
    rng = random.Random(0)
    for _ in range(ROUNDS):
        rng.shuffle(order)
        asks = {name: asking(served[name], inputs) for name in order}
        for call in range(-calls // 10 // ROUNDS, calls // ROUNDS):
            rng.shuffle(order)
            for name in order:
                started = time.perf_counter()
                asks[name]()
                if call >= 0:
                    taken[name].append(1e3 * (time.perf_counter() - started))
    p50 = {name: float(np.median(ms)) for name, ms in taken.items()}
    return {
        name: {
            "p50_ms": p50[name],
            "p99_ms": float(np.quantile(ms, 0.99)),
            "ratio": p50[name] / p50[LABELS],
        }
        for name, ms in taken.items()
    }


def with_control(served: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """The labels arm once more, as a copy: sessions of one folder map the same tables into memory,
    and each finds in the caches what the other has read."""
    return {**served, CONTROL: shutil.copytree(served[LABELS], folder / "control")}


def calls(quick: bool) -> int:
    """How many calls are timed."""
    return 500 if quick else 3_000


def main() -> None:
    options = arguments("benchmarks.serving", SAYS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = config(folder, options.quick)
        stream = prepare(settings)
        run = settings.folder
        windows = stream.windows()
        init_single_process()
        train(Job("fm", settings), windows)
        supervise(settings, stream)
        job = Job("vm", settings, settings.vm.models)
        train(job, windows[:-1])
        before = export_student(run, "feed", DISTILLED, run / "before")
        train(job, windows)
        served = {arm: export_student(run, "feed", arm) for arm in (LABELS, DISTILLED)}
        delta = export_student(run, "feed", DISTILLED, since=before)
        sizes = {**{arm: size(path) for arm, path in served.items()}, "delta": size(delta)}
        figures: dict[str, Any] = {
            "bytes": sizes,
            "delta_over_full": sizes["delta"] / sizes[DISTILLED],
        }
        print(
            f"bytes: {sizes}; the delta is {figures['delta_over_full']:.1%} of the full export",
            flush=True,
        )
        bars = {}
        folders = with_control(served, run)
        for count in CANDIDATES:
            told = latency(folders, candidates(stream, count), calls(options.quick))
            own = told[DISTILLED]
            figures[f"candidates_{count}"] = {
                **told,
                "ratio": own["ratio"],
                "control": told[CONTROL]["ratio"],
            }
            print(
                f"{count:,} candidates: p50 {own['p50_ms']:.3f} ms, p99 {own['p99_ms']:.3f} ms; over labels {own['ratio']:.3f}, "
                f"labels over itself {told[CONTROL]['ratio']:.3f}",
                flush=True,
            )
            bars[f"latency_over_labels_{count}"] = bar(own["ratio"], 1 + NOISE, at_least=False)
        report("serving", figures, bars)


if __name__ == "__main__":
    main()
