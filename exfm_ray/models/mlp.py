"""A multi-layer perceptron: the plainest student."""

from __future__ import annotations

import torch
from torch import Tensor

from exfm_ray.config.models import MLPConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import relu_mlp, width_out
from exfm_ray.models.layout import Inputs


class MLP(Backbone):
    """x = relu(W ... relu(W [embeddings, dense] + b) ...)."""

    def __init__(self, config: MLPConfig, inputs: Inputs) -> None:
        super().__init__()
        width = inputs.rows * config.dim + inputs.dense
        self.hidden = relu_mlp(width, config.mlp, config.dropout)
        self.out_features = width_out(width, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """(B, R, E) and (B, D) to (B, H)."""
        x_BH: Tensor = self.hidden(torch.cat([embedded_BRE.flatten(1), dense_BD], dim=1))
        return x_BH
