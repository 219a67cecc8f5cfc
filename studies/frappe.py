"""Every model on Frappe, by configs/frappe.yaml: AUC and log loss on valid.csv and test.csv.

    python -m studies.frappe [--data DIR] [--quick]

DIR holds train.csv and valid.csv, or a folder `frappe` with them; test.csv is optional. Models
train on train.csv; valid.csv chooses the best pass and ends the training.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, bar, report
from exfm_ray.config.load import load_config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream
from exfm_ray.training.job import Job
from exfm_ray.training.local import local_loop
from exfm_ray.training.static import EarlyStopping

DESCRIPTION = (
    "Trains Wukong and every student on Frappe in passes with early stopping, 3 seeds each: "
    "about 25 minutes."
)
MODELS = {
    "wukong": "",  # the config's own
    "wukong_small": (
        "type: wukong, dim: 16, l: 1, n_F: 4, n_L: 4, k: 4, fmb_mlp: [32], mlp: [32], "
        "init_std: 0.01"
    ),
    "mlp": "type: mlp, dim: 16, mlp: [128, 64]",
    "dlrm": "type: dlrm, dim: 16, top_mlp: [128, 64]",
    "dcnv2": "type: dcnv2, dim: 16, cross_layers: 2, mlp: [128, 64]",
    "deepfm": "type: deepfm, dim: 16, mlp: [128, 64]",
    "masknet": "type: masknet, dim: 16, blocks: 3, block_width: 32, mask_mlp: [64], mlp: [64]",
    "finalmlp": "type: finalmlp, dim: 16, mlp_1: [128, 64], mlp_2: [64], heads: 4",
}
STUDENT_DENSE_LR = 0.003
"""Models without layer norms learn slowly at the Wukong's rate.

The other settings of the optimizer are the config's.
"""
SPLITS = {1: "valid", 2: "test"}


def passes(job: Job) -> tuple[list[dict[str, Any]], EarlyStopping]:
    """Run passes over the job's static set until early stopping ends them.

    Returns:
        Rows of metrics of the best pass, and the state of early stopping.
    """
    windows = EventStream.open(job.stream_root).windows()
    static = job.static(windows)
    assert static
    loop, _ = local_loop(job, windows)
    stopping = EarlyStopping(static.config)
    best: list[dict[str, Any]] = []
    while not stopping.over:
        number = stopping.last + 1
        rows = loop.run_passes(static.passes(number), number)
        if stopping.take(rows):
            best = rows
    return best, stopping


def train(
    folder: Path,
    data: Path,
    name: str,
    seed: int,
    quick: bool,
) -> dict[str, float]:
    """Train one model with one seed and return the AUC and log loss of its best pass."""
    overrides = [f"run.dir={folder}", f"data.root={data}", f"seed={seed}"]
    if MODELS[name]:
        overrides += [
            f"fm.model={{{MODELS[name]}, embeddings: {{user: 3, item: 3}}}}",
            f"fm.optimizer.dense_lr={STUDENT_DENSE_LR}",
        ]
    if quick:
        overrides.append("fm.static.passes=2")
    config = load_config(Path("configs/frappe.yaml"), overrides, f"seed{seed}")
    prepare(config)

    rows, stopping = passes(Job("fm", config))
    figures: dict[str, float] = {"best_pass": stopping.best}
    for row in rows:
        split = SPLITS[row["window"]]
        figures[f"{split}_auc"] = row["auc"]
        figures[f"{split}_log_loss"] = row["log_loss"]
    parts = [f"{key} {value:.4f}" for key, value in figures.items()]
    print(f"{name}, seed {seed}: {', '.join(parts)}", flush=True)
    return figures


def summary(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return each figure's mean over the seeds, its standard deviation and each seed's value."""
    figures: dict[str, Any] = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        figures[key] = statistics.mean(values)
        figures[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        figures[f"{key}_seeds"] = values
    return figures


def main() -> None:
    options = arguments("studies.frappe", DESCRIPTION)
    torch.set_num_threads(1)
    data = options.data / "frappe"
    if not data.is_dir():
        data = options.data
    seeds = (0,) if options.quick else (0, 1, 2)

    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            runs = [train(Path(folder), data, name, seed, options.quick) for seed in seeds]
            figures[name] = summary(runs)

    wukong = figures["wukong"]
    bars = {
        "wukong_valid_auc": bar(wukong["valid_auc"], 0.985),
        "wukong_valid_auc_published": bar(wukong["valid_auc"], 0.9868),
        "wukong_valid_log_loss_published": bar(wukong["valid_log_loss"], 0.1757, at_least=False),
    }
    report("frappe", figures, bars)


if __name__ == "__main__":
    main()
