"""The serving graph: interaction model and serving head.

An export holds this, the tables and nothing else. Shape suffixes as in `exfm_ray.models.backbone`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from exfm_ray.config.models import ModelConfig
from exfm_ray.models.layers import mlp_to, seeded
from exfm_ray.models.layout import Layout
from exfm_ray.models.registry import build_backbone
from exfm_ray.schema import Schema

LOGIT_GAIN = 0.1
"""Gain of a head's last layer. Fresh logits stay near 0, so the first steps learn the label rate
instead of undoing noise."""


class Head(nn.Module):
    """ReLU layers of `widths`, then a linear layer to `outputs` logits."""

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        outputs: int,
    ) -> None:
        super().__init__()
        self.mlp = mlp_to(inputs, widths, outputs, gain=LOGIT_GAIN)

    def forward(self, x_BH: Tensor) -> Tensor:
        """Map (B, H) to float32 logits (B, outputs), whatever the dtype of the weights."""
        logits: Tensor = self.mlp(x_BH)
        return logits.float()


class Network(nn.Module):
    """An interaction model and a linear serving head with one output per task."""

    def __init__(
        self,
        config: ModelConfig,
        schema: Schema,
        tasks: int,
    ) -> None:
        super().__init__()
        layout = Layout.from_config(config, schema)
        inputs = layout.inputs(len(schema.dense))
        self.backbone = build_backbone(config, inputs)
        self.head = Head(self.backbone.out_features, (), tasks)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """Map embedded rows (B, R, E) and dense features (B, D) to float32 logits_BT."""
        x_BH = self.features(embedded_BRE, dense_BD)
        logits_BT: Tensor = self.head(x_BH)
        return logits_BT

    def features(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """Compute x_BH, the input of the heads."""
        x_BH: Tensor = self.backbone(embedded_BRE, dense_BD)
        return x_BH


def build_network(
    config: ModelConfig,
    schema: Schema,
    tasks: int,
    seed: int,
) -> Network:
    """Build a network whose weights depend only on `seed`; torch's generator stays unchanged."""
    with seeded(seed):
        return Network(config, schema, tasks)
