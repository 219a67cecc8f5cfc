"""A multi-layer perceptron: the simplest student.

x = relu(W ... relu(W z + b) ...) of z = [embeddings, dense].
"""

from __future__ import annotations

import torch
from torch import Tensor

from exfm_ray.config.models import MLPConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import relu_mlp, width_out
from exfm_ray.models.layout import Inputs


class MLP(Backbone):
    """ReLU layers over the flattened embeddings and the dense features."""

    def __init__(self, config: MLPConfig, inputs: Inputs) -> None:
        super().__init__()
        width = inputs.rows * config.dim + inputs.dense
        self.hidden = relu_mlp(width, config.mlp, config.dropout)
        self.out_features = width_out(width, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """Map (B, R, E) and (B, D) to (B, H)."""
        start_BC = torch.cat([embedded_BRE.flatten(1), dense_BD], dim=1)
        x_BH: Tensor = self.hidden(start_BC)
        return x_BH
