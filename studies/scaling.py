"""Does NE fall with compute, and faster for Wukong than for DCN-V2 and an MLP?

    python -m studies.scaling [--quick]

On the synthetic stream, one pass. Every family in five sizes over a 16-fold range of forward FLOPs
per example, on the same three streams of 12 windows of 100,000 events; a seed makes a stream and
the weights. The task is the click. NE is of windows 4 to 11 together, each evaluated before it is
learned. All models have the same tables (dim 16), batch size and table_lr: 0.2, the best of 0.05,
0.1 and 0.2 for every family's middle size. Each family has the dense_lr of 0.0005, 0.001 and 0.002
that was best for its largest size; 0.004 suits the middle sizes of DCN-V2 and the MLP better, but
the largest sizes diverge with it. All this was chosen on 8 windows of 60,000 events of seed 100,
which is not among the seeds here.

NE = a - b log2(FLOPs) is fitted by least squares for each family, with its own a for each stream,
because streams differ in how much there is to learn. The drawing is written to docs/scaling.svg
(not with --quick). One torch thread for a model, as many models at a time as cores.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from benchmarks.common import arguments, bar, report
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream
from exfm_ray.models.flops import forward_flops
from exfm_ray.models.layout import Layout
from exfm_ray.training.job import Job
from exfm_ray.training.local import local_loop
from studies.scaling_plot import draw

DESCRIPTION = (
    "Trains Wukong, DCN-V2 and an MLP in five sizes each on three streams: "
    "about 20 minutes on two cores (--quick: 1)."
)
DRAWING = Path(__file__).parents[1] / "docs" / "scaling.svg"
TABLE_LR = 0.2
BATCH_SIZE = 1024
WARMUP_WINDOWS = 4
DENSE_LR = {"wukong": 0.001, "dcnv2": 0.002, "mlp": 0.002}
BASELINES = ("dcnv2", "mlp")
CLEAR = 2.0
"""Standard errors from which on two slopes differ."""


class Plan(NamedTuple):
    """How much is trained: windows, events per window, sizes of each family, seeds."""

    windows: int
    events: int
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]


FULL = Plan(12, 100_000, (0, 1, 2, 3, 4), (0, 1, 2))
QUICK = Plan(2, 50_000, (0, 2, 4), (0,))


def wukong(
    layers: int,
    n: int,
    k: int,
    mlp: int,
) -> dict[str, Any]:
    return {
        "type": "wukong",
        "l": layers,
        "n_F": n,
        "n_L": n,
        "k": k,
        "fmb_mlp": [mlp],
        "mlp": [mlp],
    }


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
    """One training: a family, the position of its size, a seed."""

    family: str
    size: int
    seed: int


RunFigures = dict[str, float]
"""flops and examples_per_s of a training, dense_parameters of its model, and its ne."""


def config(
    run: Run,
    folder: Path,
    windows: int,
    events: int,
) -> Config:
    """Return the run's config. Runs of one seed share a stream."""
    model = {**MODELS[run.family][run.size], "dim": 16}
    fm = {
        "tasks": ["click"],
        "batch_size": BATCH_SIZE,
        "optimizer": {"table_lr": TABLE_LR, "dense_lr": DENSE_LR[run.family]},
        "model": model,
    }
    synthetic = {"seed": run.seed, "windows": windows, "events_per_window": events}
    tree = {
        "name": f"seed{run.seed}",
        "seed": run.seed,
        "run": {"dir": folder},
        "data": {"source": "synthetic", "synthetic": synthetic},
        "fm": fm,
        "metrics": {"warmup_windows": min(WARMUP_WINDOWS, windows - 1)},
    }
    return Config.model_validate(tree)


def train(settings: Config) -> RunFigures:
    """Train one pass in this process."""
    torch.set_num_threads(1)
    stream = EventStream.open(settings.folder / "stream")
    loop, _ = local_loop(Job("fm", settings), stream.windows())
    started = time.perf_counter()
    for window in stream.windows():
        loop.run(window)
    seconds = time.perf_counter() - started

    (state,) = (state for key, state in loop.states.items() if key[2] == "all")
    network = loop.groups[0].trainers[0].engine.dense.module.network
    layout = Layout.from_config(settings.fm.model, stream.schema)
    inputs = layout.inputs(len(stream.schema.dense))
    return {
        "flops": forward_flops(settings.fm.model, inputs),
        "dense_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "ne": state.figures()["ne"] or float("nan"),
        "examples_per_s": sum(timing.examples for timing in loop.timings) / seconds,
    }


def train_all(
    runs: Sequence[Run],
    folder: Path,
    windows: int,
    events: int,
) -> dict[Run, RunFigures]:
    """Train all runs, the longest first, one for each core at a time."""
    longest_first = sorted(runs, key=lambda run: -run.size)
    configs = {run: config(run, folder, windows, events) for run in longest_first}
    one_of_stream = {settings.folder: settings for settings in configs.values()}
    for settings in one_of_stream.values():
        prepare(settings)

    results = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        waiting = {pool.submit(train, settings): run for run, settings in configs.items()}
        for done in as_completed(waiting):
            run = waiting[done]
            figures = done.result()
            results[run] = figures
            print(
                f"{len(results)} of {len(runs)}: {run.family} {run.size}, seed {run.seed}: "
                f"{figures['flops'] / 1e3:,.0f} kFLOP, NE {figures['ne']:.5f}, "
                f"{figures['examples_per_s']:,.0f} examples/s",
                flush=True,
            )
    return results


def fit(results: Mapping[Run, RunFigures], family: str) -> dict[str, Any]:
    """Fit NE = a_seed - b log2(FLOPs): b, its standard error, and the mean of a over the seeds."""
    runs = [run for run in results if run.family == family]
    seeds = sorted({run.seed for run in runs})
    rows = []
    for run in runs:
        is_seed = [float(run.seed == seed) for seed in seeds]
        rows.append([*is_seed, -np.log2(results[run]["flops"])])
    x: np.ndarray = np.array(rows)
    y = np.array([results[run]["ne"] for run in runs])

    solution, *_ = np.linalg.lstsq(x, y, rcond=None)
    residual = y - x @ solution
    degrees_of_freedom = len(y) - x.shape[1]
    variance = residual @ residual / degrees_of_freedom
    error = np.sqrt(variance * np.linalg.inv(x.T @ x)[-1, -1])
    return {
        "a": float(solution[:-1].mean()),
        "b": float(solution[-1]),
        "b_standard_error": float(error),
    }


def summary(results: Mapping[Run, RunFigures]) -> dict[str, Any]:
    """Return each family's sizes with their figures, and its fit."""
    families: dict[str, Any] = {}
    for family, models in MODELS.items():
        sizes = []
        for size, model in enumerate(models):
            of_size = [results[run] for run in sorted(results) if run[:2] == (family, size)]
            if of_size:
                sizes.append(_size_summary(model, of_size))
        families[family] = {"sizes": sizes, **fit(results, family)}
    return families


def _size_summary(model: Mapping[str, Any], of_seeds: Sequence[RunFigures]) -> dict[str, Any]:
    nes = [figures["ne"] for figures in of_seeds]
    speeds = [figures["examples_per_s"] for figures in of_seeds]
    return {
        "model": model,
        "flops": of_seeds[0]["flops"],
        "dense_parameters": of_seeds[0]["dense_parameters"],
        "ne": float(np.mean(nes)),
        "examples_per_s": float(np.mean(speeds)),
        "ne_seeds": nes,
    }


def slope_bars(families: Mapping[str, Any]) -> dict[str, Any]:
    """Compare Wukong's slope with the others, print the verdicts and return the bars."""
    wukong_fit = families["wukong"]
    bars = {}
    for name in BASELINES:
        family = families[name]
        difference = wukong_fit["b"] - family["b"]
        error = np.hypot(wukong_fit["b_standard_error"], family["b_standard_error"])
        verdict = "not distinguishable from"
        if difference > CLEAR * error:
            verdict = "steeper than"
        elif difference < -CLEAR * error:
            verdict = "flatter than"
        print(
            f"Wukong's line is {verdict} that of {name}: "
            f"{difference:+.5f} ± {error:.5f} per doubling"
        )
        in_errors = float(difference / error)
        bars[f"wukong_slope_over_{name}_in_standard_errors"] = bar(in_errors, CLEAR)
    return bars


def main() -> None:
    options = arguments("studies.scaling", DESCRIPTION)
    plan = QUICK if options.quick else FULL
    runs = [
        Run(family, size, seed) for family in MODELS for size in plan.sizes for seed in plan.seeds
    ]
    with tempfile.TemporaryDirectory() as folder:
        results = train_all(runs, Path(folder), plan.windows, plan.events)
    families = summary(results)

    flops_range = {}
    for name, family in families.items():
        slope = f"{family['b']:.5f} ± {family['b_standard_error']:.5f}"
        print(f"{name}: NE falls by {slope} with each doubling of FLOPs")
        flops_range[name] = family["sizes"][-1]["flops"] / family["sizes"][0]["flops"]
    if not options.quick:
        draw(families, DRAWING)

    bars = slope_bars(families)
    plain = json.loads(json.dumps(families))
    report("scaling", {"seeds": plan.seeds, "flops_range": flops_range, **plain}, bars)


if __name__ == "__main__":
    main()
