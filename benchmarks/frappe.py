"""Every model on Frappe, by configs/frappe.yaml: AUC and log loss on valid.csv, and on test.csv where it is there.

    python -m benchmarks.frappe [--data DIR] [--quick]

DIR holds train.csv and valid.csv, or a folder `frappe` with them. train.csv is learnt, valid.csv chooses the pass and stops.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import bare_static
from benchmarks.common import arguments, bar, report
from exfm_ray.config import Config, load_config
from exfm_ray.data.prepare import prepare
from exfm_ray.training.job import Job

SAYS = "trains Wukong and every student on Frappe in passes with early stopping, 3 seeds each; about 20 minutes on 2 cores"
MODELS: dict[str, str | None] = {
    "wukong": None,  # the config's own
    "mlp": "{type: mlp, dim: 16, mlp: [400, 400, 400], dropout: 0.2}",
    "dlrm": "{type: dlrm, dim: 16, top_mlp: [400, 400, 400], dropout: 0.2}",
    "dcnv2": "{type: dcnv2, dim: 16, cross_layers: 3, mlp: [400, 400, 400], dropout: 0.2}",
    "deepfm": "{type: deepfm, dim: 16, mlp: [400, 400, 400], dropout: 0.2}",
    "masknet": "{type: masknet, dim: 16, blocks: 3, block_width: 64, mask_mlp: [128], mlp: [400, 400], dropout: 0.2}",
    "finalmlp": "{type: finalmlp, dim: 16, mlp_1: [400, 400, 400], mlp_2: [400], gate_mlp: [128], heads: 10, dropout: 0.2}",
    "wukong_small": "{type: wukong, dim: 8, l: 2, n_F: 4, n_L: 4, k: 4, fmb_mlp: [32], mlp: [64], dropout: 0.1}",
}
SPLITS = {1: "valid", 2: "test"}


def train(folder: Path, data: Path, name: str, seed: int, quick: bool) -> dict[str, float]:
    """One model with one seed: AUC and log loss of its best pass."""
    model = MODELS[name]
    settings = [f"run.dir={folder}", f"data.root={data}", f"seed={seed}", *([f"fm.model={model}"] if model else [])]
    settings += ["fm.static.passes=2"] if quick else []
    config: Config = load_config(Path("configs/frappe.yaml"), settings, f"seed{seed}")
    prepare(config)
    rows, stopping = bare_static(Job("fm", config))
    figures: dict[str, float] = {"best_pass": stopping.best}
    for row in rows:
        figures |= {f"{SPLITS[row['window']]}_{key}": row[key] for key in ("auc", "log_loss")}
    print(f"{name}, seed {seed}: " + ", ".join(f"{key} {value:.4f}" for key, value in figures.items()), flush=True)
    return figures


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Means over the seeds, their spread, and each seed's figure."""
    found: dict[str, Any] = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        found |= {key: statistics.mean(values), f"{key}_std": statistics.stdev(values) if len(values) > 1 else 0.0, f"{key}_seeds": values}
    return found


def main() -> None:
    options = arguments("frappe", SAYS)
    torch.set_num_threads(2)
    data = options.data / "frappe" if (options.data / "frappe").is_dir() else options.data
    with tempfile.TemporaryDirectory() as folder:
        seeds = (0,) if options.quick else (0, 1, 2)
        figures = {name: summary([train(Path(folder), data, name, seed, options.quick) for seed in seeds]) for name in MODELS}
    wukong = figures["wukong"]
    bars = {
        "wukong_valid_auc": bar(wukong["valid_auc"], 0.985),
        "wukong_valid_auc_published": bar(wukong["valid_auc"], 0.9868),
        "wukong_valid_log_loss_published": bar(wukong["valid_log_loss"], 0.1757, at_least=False),
    }
    report("frappe", figures, bars)


if __name__ == "__main__":
    main()
