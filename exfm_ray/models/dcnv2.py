"""DCN-V2 (arXiv 2008.13535), parallel form: full-rank cross layers beside an MLP, their outputs
side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exfm_ray.config.models import DCNv2Config
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import linear, relu_mlp, width_out
from exfm_ray.models.layout import Inputs


class DCNv2(Backbone):
    """x_0 = [embeddings, dense]; cross: x' = x_0 * (W x + b) + x; x = [cross(x_0), mlp(x_0)]."""

    def __init__(self, config: DCNv2Config, inputs: Inputs) -> None:
        super().__init__()
        width = inputs.rows * config.dim + inputs.dense
        self.cross = nn.ModuleList(linear(width, width) for _ in range(config.cross_layers))
        self.deep = relu_mlp(width, config.mlp, config.dropout)
        self.out_features = width + width_out(width, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """(B, R, E) and (B, D) to (B, H)."""
        start_BC = torch.cat([embedded_BRE.flatten(1), dense_BD], dim=1)
        cross_BC = start_BC
        for layer in self.cross:
            cross_BC = torch.addcmul(cross_BC, start_BC, layer(cross_BC))
        return torch.cat([cross_BC, self.deep(start_BC)], dim=1)
