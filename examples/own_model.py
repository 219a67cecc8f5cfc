"""A model of your own: its settings, its layers, and a run that trains it. Nothing else to edit.

    python examples/own_model.py [RUN_FOLDER]

The run trains the foundation model and two students on the synthetic stream: one from labels
alone, one distilled. It takes less than a minute on 2 cores. Rerun the command to resume.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from exfm_ray import PipelineRunner, load_config
from exfm_ray.config.models import BackboneConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import linear, relu_mlp, width_out
from exfm_ray.models.layout import Inputs
from exfm_ray.pipeline.preflight import prepare_stream


class GatedMLP(Backbone):
    """An MLP that scales each of its inputs: x = MLP(2 sigmoid(G z + g) * z)."""

    class Config(BackboneConfig):
        """Settings in YAML, beside `dim` and the others of every model."""

        mlp: tuple[int, ...] = (64, 32)

    def __init__(self, config: Config, inputs: Inputs) -> None:
        super().__init__()
        width = inputs.rows * config.dim + inputs.dense
        self.gate = linear(width, width)
        self.mlp = relu_mlp(width, config.mlp, config.dropout)
        self.out_features = width_out(width, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """Embedded rows (B, R, E) and dense features (B, D) to x (B, H)."""
        z_BC = torch.cat([embedded_BRE.flatten(1), dense_BD], dim=1)
        gate_BC = 2 * torch.sigmoid(self.gate(z_BC))
        x_BH: Tensor = self.mlp(gate_BC * z_BC)
        return x_BH


SETTINGS = [
    "data.synthetic.windows=6",
    "data.synthetic.events_per_window=10000",
    "data.synthetic.users=400",
    "data.synthetic.ads=100",
    "vm.arms=[labels, ah]",
    "vm.models=[{name: feed, domain: feed, task: click}]",
    "vm.model={type: own_model:GatedMLP, dim: 8, mlp: [32, 16]}",
]


def main(folder: Path) -> None:
    """Train in `folder` and print one line per student."""
    overrides = [*SETTINGS, f"run.dir={folder.parent}"]
    config = load_config(Path("configs/demo.yaml"), overrides, name=folder.name)

    run = PipelineRunner(config, prepare_stream(config))
    run.execute()
    summary = run.summarize()

    for row in summary["figures"]:
        if row["role"] == "vm":
            print(f"{row['model']} {row['arm']}: NE {row['ne']:.4f}, AUC {row['auc']:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_model"))
