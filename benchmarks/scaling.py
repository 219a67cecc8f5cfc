"""Does NE fall with compute, and faster for Wukong than for DCN-V2 and an MLP? On the synthetic
stream, one pass.

    python -m benchmarks.scaling [--quick]

Every family in five sizes over a 16-fold range of forward FLOPs per example, on the same three
streams of 12 windows of 100,000 events; a seed makes a stream and the weights. The task is the
click, the NE that of windows 4 to 11 together, each evaluated before it is learnt. All models have
the same tables (dim 16), batch and table_lr: 0.2, the best for every family's middle size of 0.05,
0.1 and 0.2. Each family has the dense_lr that was best for its largest size of 0.0005, 0.001 and
0.002; the middle sizes of DCN-V2 and the MLP would rather have 0.004, which the largest do not
bear. All this was chosen on 8 windows of 60,000 events of seed 100, which is none of the seeds
here.

For each family NE = a - b log2(FLOPs) is fitted by least squares, with an a of its own for each
stream, for streams differ in how much there is to know. The drawing goes to docs/scaling.svg (not
with --quick). One torch thread for a model, as many models at a time as cores.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from benchmarks.common import arguments, bar, report
from benchmarks.scaling_plot import draw
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream
from exfm_ray.models.flops import forward_flops
from exfm_ray.models.layout import Layout
from exfm_ray.training.job import Job
from exfm_ray.training.local import local_loop

SAYS = "Trains Wukong, DCN-V2 and an MLP in five sizes each on three streams: about 20 minutes on two cores (--quick: 1)."
DRAWING = Path(__file__).parents[1] / "docs" / "scaling.svg"
TABLE_LR = 0.2
BATCH_SIZE = 1024
WARMUP_WINDOWS = 4
DENSE_LR = {"wukong": 0.001, "dcnv2": 0.002, "mlp": 0.002}


def wukong(
    l: int,
    n: int,
    k: int,
    mlp: int,
) -> dict[str, Any]:  # noqa: E741 - the paper's own name
    return {"type": "wukong", "l": l, "n_F": n, "n_L": n, "k": k, "fmb_mlp": [mlp], "mlp": [mlp]}


def dcnv2(layers: int, *mlp: int) -> dict[str, Any]:
    return {"type": "dcnv2", "cross_layers": layers, "mlp": list(mlp)}


def mlp(*widths: int) -> dict[str, Any]:
    return {"type": "mlp", "mlp": list(widths)}


MODELS = {
    "wukong": (
        wukong(1, 8, 8, 64),
        wukong(2, 8, 8, 88),
        wukong(2, 12, 12, 108),
        wukong(3, 12, 12, 164),
        wukong(3, 16, 13, 256),
    ),
    "dcnv2": (
        dcnv2(1, 32, 16),
        dcnv2(2, 64, 32),
        dcnv2(3, 208, 104),
        dcnv2(4, 448, 224),
        dcnv2(6, 832, 416),
    ),
    "mlp": (mlp(160, 80), mlp(256, 128), mlp(416, 208), mlp(640, 320), mlp(960, 480)),
}


class Run(NamedTuple):
    """One training."""

    family: str
    size: int
    seed: int


def config(
    run: Run,
    folder: Path,
    windows: int,
    events: int,
) -> Config:
    """The run's settings; runs of one seed share a stream."""
    optimizer = {"table_lr": TABLE_LR, "dense_lr": DENSE_LR[run.family]}
    fm = {
        "tasks": ["click"],
        "batch_size": BATCH_SIZE,
        "optimizer": optimizer,
        "model": {**MODELS[run.family][run.size], "dim": 16},
    }
    embedded = {"seed": run.seed, "windows": windows, "events_per_window": events}
    tree = {
        "name": f"seed{run.seed}",
        "seed": run.seed,
        "run": {"dir": folder},
        "data": {"source": "synthetic", "synthetic": embedded},
        "fm": fm,
    }
    return Config.model_validate(
        {**tree, "metrics": {"warmup_windows": min(WARMUP_WINDOWS, windows - 1)}}
    )


def train(settings: Config) -> dict[str, float]:
    """One pass, in this process: FLOPs of the forward pass per example, parameters of the dense
    part, NE, examples/s of evaluating and learning."""
    torch.set_num_threads(1)
    job = Job("fm", settings)
    stream = EventStream.open(settings.folder / "stream")
    loop, _ = local_loop(job, stream.windows())
    started = time.perf_counter()
    for window in stream.windows():
        loop.run(window)
    seconds = time.perf_counter() - started
    (state,) = (state for key, state in loop.states.items() if key[2] == "all")
    network = loop.groups[0].lanes[0].engine.dense.module.network
    return {
        "flops": forward_flops(
            settings.fm.model,
            Layout.from_config(settings.fm.model, stream.schema).inputs(len(stream.schema.dense)),
        ),
        "dense_parameters": sum(p.numel() for p in network.parameters()),
        "ne": state.figures()["ne"] or float("nan"),
        "examples_per_s": sum(t.examples for t in loop.timings) / seconds,
    }


def train_all(
    runs: list[Run],
    folder: Path,
    windows: int,
    events: int,
) -> dict[Run, dict[str, float]]:
    """All runs, the longest first, one for each core at a time."""
    configs = {
        run: config(run, folder, windows, events) for run in sorted(runs, key=lambda run: -run.size)
    }
    for settings in {settings.folder: settings for settings in configs.values()}.values():
        prepare(settings)
    found = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        waiting = {pool.submit(train, settings): run for run, settings in configs.items()}
        for done in as_completed(waiting):
            run = waiting[done]
            figures = done.result()
            found[run] = figures
            print(
                f"{len(found)} of {len(runs)}: {run.family} {run.size}, seed {run.seed}: {figures['flops'] / 1e3:,.0f} kFLOP, "
                f"NE {figures['ne']:.5f}, {figures['examples_per_s']:,.0f} examples/s",
                flush=True,
            )
    return found


def fit(found: dict[Run, dict[str, float]], family: str) -> dict[str, Any]:
    """b of NE = a_seed - b log2(FLOPs), its standard error, and the means over the seeds of a."""
    runs = [run for run in found if run.family == family]
    seeds = sorted({run.seed for run in runs})
    columns = [
        [float(run.seed == seed) for seed in seeds] + [-np.log2(found[run]["flops"])]
        for run in runs
    ]
    x: np.ndarray = np.array(columns)
    y = np.array([found[run]["ne"] for run in runs])
    solution, *_ = np.linalg.lstsq(x, y, rcond=None)
    residual = y - x @ solution
    free = len(y) - x.shape[1]
    error = np.sqrt(residual @ residual / free * np.linalg.inv(x.T @ x)[-1, -1])
    return {
        "a": float(solution[:-1].mean()),
        "b": float(solution[-1]),
        "b_standard_error": float(error),
    }


def summary(found: dict[Run, dict[str, float]]) -> dict[str, Any]:
    """Per family: its sizes with their figures, and its fit."""
    told: dict[str, Any] = {}
    for family, models in MODELS.items():
        sizes = []
        for size, model in enumerate(models):
            of_size = [found[run] for run in sorted(found) if run[:2] == (family, size)]
            if of_size:
                same = {key: of_size[0][key] for key in ("flops", "dense_parameters")}
                mean = {
                    key: float(np.mean([f[key] for f in of_size]))
                    for key in ("ne", "examples_per_s")
                }
                sizes.append(
                    {"model": model, **same, **mean, "ne_seeds": [f["ne"] for f in of_size]}
                )
        told[family] = {"sizes": sizes, **fit(found, family)}
    return told


def main() -> None:
    options = arguments("scaling", SAYS)
    windows, events, sizes, seeds = (
        (2, 50_000, (0, 2, 4), (0,)) if options.quick else (12, 100_000, tuple(range(5)), (0, 1, 2))
    )
    runs = [Run(family, size, seed) for family in MODELS for size in sizes for seed in seeds]
    with tempfile.TemporaryDirectory() as folder:
        told = summary(train_all(runs, Path(folder), windows, events))
    for family, f in told.items():
        print(
            f"{family}: NE falls by {f['b']:.5f} ± {f['b_standard_error']:.5f} with each doubling of FLOPs"
        )
    if not options.quick:
        draw(told, DRAWING)
    others = {family: told["wukong"]["b"] - told[family]["b"] for family in ("dcnv2", "mlp")}
    errors = {
        family: np.hypot(told["wukong"]["b_standard_error"], told[family]["b_standard_error"])
        for family in others
    }
    for family, gain in others.items():
        verdict = (
            "steeper than"
            if gain > 2 * errors[family]
            else "flatter than"
            if gain < -2 * errors[family]
            else "not told apart from"
        )
        print(
            f"Wukong's line is {verdict} that of {family}: {gain:+.5f} ± {errors[family]:.5f} per doubling"
        )
    bars = {
        f"wukong_slope_over_{family}_in_standard_errors": bar(float(gain / errors[family]), 2.0)
        for family, gain in others.items()
    }
    range_of = {
        family: f["sizes"][-1]["flops"] / f["sizes"][0]["flops"] for family, f in told.items()
    }
    report(
        "scaling", {"seeds": seeds, "flops_range": range_of, **json.loads(json.dumps(told))}, bars
    )


if __name__ == "__main__":
    main()
