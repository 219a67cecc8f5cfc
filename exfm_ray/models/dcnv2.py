"""DCN-V2 (arXiv 2008.13535), parallel form: full-rank cross layers beside an MLP.

    x_0 = [embeddings, dense]
    x_n = x_0 * (W_n x_(n-1) + b_n) + x_(n-1)        the cross layers
    x   = [x_last, MLP(x_0)]

Shape suffixes as in `exfm_ray.models.backbone`; C = R E + D columns of x_0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exfm_ray.config.models import DCNv2Config
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import linear, relu_mlp, width_out
from exfm_ray.models.layout import Inputs


class DCNv2(Backbone):
    """Cross layers and an MLP over the same input, with their outputs side by side."""

    def __init__(self, config: DCNv2Config, inputs: Inputs) -> None:
        super().__init__()
        width = inputs.rows * config.dim + inputs.dense

        cross_layers = [linear(width, width) for _ in range(config.cross_layers)]
        self.cross = nn.ModuleList(cross_layers)
        self.deep = relu_mlp(width, config.mlp, config.dropout)
        self.out_features = width + width_out(width, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """Map (B, R, E) and (B, D) to (B, H)."""
        start_BC = torch.cat([embedded_BRE.flatten(1), dense_BD], dim=1)

        cross_BC = start_BC
        for layer in self.cross:
            mapped_BC = layer(cross_BC)
            cross_BC = torch.addcmul(cross_BC, start_BC, mapped_BC)

        deep_BH = self.deep(start_BC)
        return torch.cat([cross_BC, deep_BH], dim=1)
