"""DLRM (arXiv 1906.00091): dot products of all pairs of rows.

    bottom = MLP(dense)                                              one more row; absent if D is 0
    x      = MLP([bottom, <row i, row j> for all i < j])             the bottom row is the last row

Shape suffixes as in `exfm_ray.models.backbone`; N rows including the bottom row, P pairs of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exfm_ray.config.models import DLRMConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import mlp_to, relu_mlp, width_out
from exfm_ray.models.layout import Inputs


class DLRM(Backbone):
    """A bottom MLP for the dense features, dot products of all pairs of rows, a top MLP."""

    pair_index_P: Tensor

    def __init__(self, config: DLRMConfig, inputs: Inputs) -> None:
        super().__init__()
        has_dense = inputs.dense > 0
        self.bottom = (
            mlp_to(inputs.dense, config.bottom_mlp, config.dim, dropout=config.dropout)
            if has_dense
            else None
        )

        rows = inputs.rows + has_dense
        first_P, second_P = torch.triu_indices(rows, rows, offset=1)
        pair_index_P = first_P * rows + second_P
        self.register_buffer("pair_index_P", pair_index_P, persistent=False)

        width = len(pair_index_P) + has_dense * config.dim
        self.top = relu_mlp(width, config.top_mlp, config.dropout)
        self.out_features = width_out(width, config.top_mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """Map (B, R, E) and (B, D) to (B, H)."""
        if self.bottom is None:
            pairs_BP = self.pairs(embedded_BRE)
            x_BH: Tensor = self.top(pairs_BP)
            return x_BH

        bottom_BE = self.bottom(dense_BD)
        rows_BNE = torch.cat([embedded_BRE, bottom_BE.unsqueeze(1)], dim=1)
        pairs_BP = self.pairs(rows_BNE)
        x_BH = self.top(torch.cat([bottom_BE, pairs_BP], dim=1))
        return x_BH

    def pairs(self, rows_BNE: Tensor) -> Tensor:
        """Compute the dot products of all pairs of rows, (B, N, E) to (B, N (N - 1) / 2)."""
        products_BNN = torch.bmm(rows_BNE, rows_BNE.transpose(1, 2))
        return products_BNN.flatten(1).index_select(1, self.pair_index_P)
