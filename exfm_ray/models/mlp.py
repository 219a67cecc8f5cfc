"""A multi-layer perceptron: the plainest student."""

from __future__ import annotations

import torch
from torch import Tensor

from exfm_ray.config import MLPConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import relu_mlp, width_out


class MLP(Backbone):
    """x = relu(W ... relu(W [embeddings, dense] + b) ...)."""

    def __init__(self, config: MLPConfig, features: int, dense: int) -> None:
        super().__init__()
        inputs = features * config.dim + dense
        self.hidden = relu_mlp(inputs, config.mlp)
        self.out_features = width_out(inputs, config.mlp)

    def forward(self, embedded_BFE: Tensor, dense_BD: Tensor) -> Tensor:
        """(B, F, E) and (B, D) to (B, H)."""
        x_BH: Tensor = self.hidden(torch.cat([embedded_BFE.flatten(1), dense_BD], dim=1))
        return x_BH
