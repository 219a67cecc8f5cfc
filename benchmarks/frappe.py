"""Every model on Frappe, by configs/frappe.yaml: AUC and log loss on valid.csv, and on test.csv
where it is there.

    python -m benchmarks.frappe [--data DIR] [--quick]

DIR holds train.csv and valid.csv, or a folder `frappe` with them. train.csv is learnt, valid.csv
chooses the pass and stops.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, bar, report
from exfm_ray.config.load import load_config
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream
from exfm_ray.training.job import Job
from exfm_ray.training.local import local_loop
from exfm_ray.training.static import EarlyStopping

SAYS = "trains Wukong and every student on Frappe in passes with early stopping, 3 seeds each; about 25 minutes"
MODELS = {
    "wukong": "",  # the config's own
    "wukong_small": "type: wukong, dim: 16, l: 1, n_F: 4, n_L: 4, k: 4, fmb_mlp: [32], mlp: [32], init_std: 0.01",
    "mlp": "type: mlp, dim: 16, mlp: [128, 64]",
    "dlrm": "type: dlrm, dim: 16, top_mlp: [128, 64]",
    "dcnv2": "type: dcnv2, dim: 16, cross_layers: 2, mlp: [128, 64]",
    "deepfm": "type: deepfm, dim: 16, mlp: [128, 64]",
    "masknet": "type: masknet, dim: 16, blocks: 3, block_width: 32, mask_mlp: [64], mlp: [64]",
    "finalmlp": "type: finalmlp, dim: 16, mlp_1: [128, 64], mlp_2: [64], heads: 4",
}
STUDENT_DENSE_LR = 0.003
"""Models without layer norms learn slowly at the Wukong's rate; the optimizer's other settings are
the config's."""
SPLITS = {1: "valid", 2: "test"}


def passes(job: Job) -> tuple[list[dict[str, Any]], EarlyStopping]:
    """Passes over the job's static set until early stopping; the best pass's rows, and how it
    went."""
    windows = EventStream.open(job.stream_root).windows()
    static = job.static(windows)
    assert static
    loop, _ = local_loop(job, windows)
    stopping = EarlyStopping(static.config)
    best: list[dict[str, Any]] = []
    while not stopping.over:
        rows = loop.run_passes(static.passes(stopping.last + 1), stopping.last + 1)
        best = rows if stopping.take(rows) else best
    return best, stopping


def train(
    folder: Path,
    data: Path,
    name: str,
    seed: int,
    quick: bool,
) -> dict[str, float]:
    """One model with one seed: AUC and log loss of its best pass."""
    settings = [f"run.dir={folder}", f"data.root={data}", f"seed={seed}"]
    if MODELS[name]:
        settings += [
            f"fm.model={{{MODELS[name]}, embeddings: {{user: 3, item: 3}}}}",
            f"fm.optimizer.dense_lr={STUDENT_DENSE_LR}",
        ]
    settings += ["fm.static.passes=2"] if quick else []
    config: Config = load_config(Path("configs/frappe.yaml"), settings, f"seed{seed}")
    prepare(config)
    rows, stopping = passes(Job("fm", config))
    figures: dict[str, float] = {"best_pass": stopping.best}
    for row in rows:
        figures |= {f"{SPLITS[row['window']]}_{key}": row[key] for key in ("auc", "log_loss")}
    print(
        f"{name}, seed {seed}: "
        + ", ".join(f"{key} {value:.4f}" for key, value in figures.items()),
        flush=True,
    )
    return figures


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Means over the seeds, their spread, and each seed's figure."""
    found: dict[str, Any] = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        found |= {
            key: statistics.mean(values),
            f"{key}_std": statistics.stdev(values) if len(values) > 1 else 0.0,
            f"{key}_seeds": values,
        }
    return found


def main() -> None:
    options = arguments("frappe", SAYS)
    torch.set_num_threads(1)
    data = options.data / "frappe" if (options.data / "frappe").is_dir() else options.data
    with tempfile.TemporaryDirectory() as folder:
        seeds = (0,) if options.quick else (0, 1, 2)
        figures = {
            name: summary([train(Path(folder), data, name, seed, options.quick) for seed in seeds])
            for name in MODELS
        }
    wukong = figures["wukong"]
    bars = {
        "wukong_valid_auc": bar(wukong["valid_auc"], 0.985),
        "wukong_valid_auc_published": bar(wukong["valid_auc"], 0.9868),
        "wukong_valid_log_loss_published": bar(wukong["valid_log_loss"], 0.1757, at_least=False),
    }
    report("frappe", figures, bars)


if __name__ == "__main__":
    main()
