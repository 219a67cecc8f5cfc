"""DLRM (arXiv 1906.00091): dot products of all pairs of rows, dense features through a bottom MLP
to one row."""

from __future__ import annotations

import torch
from torch import Tensor

from exfm_ray.config.models import DLRMConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import mlp_to, relu_mlp, width_out
from exfm_ray.models.layout import Inputs


class DLRM(Backbone):
    """x = top_mlp([bottom row, <row i, row j> for all i < j]); the bottom row is the last row,
    absent without dense features."""

    pair_index_P: Tensor

    def __init__(self, config: DLRMConfig, inputs: Inputs) -> None:
        super().__init__()
        rows = inputs.rows + (inputs.dense > 0)
        self.bottom = (
            mlp_to(inputs.dense, config.bottom_mlp, config.dim, dropout=config.dropout)
            if inputs.dense
            else None
        )
        first_P, second_P = torch.triu_indices(rows, rows, offset=1)
        self.register_buffer("pair_index_P", first_P * rows + second_P, persistent=False)
        width = len(first_P) + (config.dim if inputs.dense else 0)
        self.top = relu_mlp(width, config.top_mlp, config.dropout)
        self.out_features = width_out(width, config.top_mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """(B, R, E) and (B, D) to (B, H)."""
        if self.bottom is None:
            x_BH: Tensor = self.top(self.pairs(embedded_BRE))
            return x_BH
        bottom_BE = self.bottom(dense_BD)
        pairs_BP = self.pairs(torch.cat([embedded_BRE, bottom_BE.unsqueeze(1)], dim=1))
        x_BH = self.top(torch.cat([bottom_BE, pairs_BP], dim=1))
        return x_BH

    def pairs(self, rows_BNE: Tensor) -> Tensor:
        """Dot products of all pairs of rows, (B, N, E) to (B, N (N - 1) / 2)."""
        return (
            torch.bmm(rows_BNE, rows_BNE.transpose(1, 2))
            .flatten(1)
            .index_select(1, self.pair_index_P)
        )
