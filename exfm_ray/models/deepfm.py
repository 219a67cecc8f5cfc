"""DeepFM (arXiv 1703.04247): a factorization machine beside an MLP over the same embeddings.

    x = [ <w, z> + b,  sum over i < j of <v_i, v_j>,  MLP(z) ]        z = [embeddings, dense]

The v_i are the embedded rows and, for each dense feature d, its value times a learned row: x_d V_d.
The paper gives every id a first-order weight of its own. Here that weight is a linear form of the
id's embedded row, another form w_i for every row: there is no second table of width 1 to shard,
store and score with. The serving head adds up the three parts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exfm_ray.config.models import DeepFMConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import linear, relu_mlp, width_out
from exfm_ray.models.layout import Inputs


class DeepFM(Backbone):
    """x = [first order, second order, MLP]: 2 columns and those of the MLP."""

    def __init__(self, config: DeepFMConfig, inputs: Inputs) -> None:
        super().__init__()
        width = inputs.rows * config.dim + inputs.dense
        self.first_order = linear(width, 1)
        self.dense_DE = (
            nn.Parameter(torch.empty(inputs.dense, config.dim).normal_(0.0, config.init_std))
            if inputs.dense
            else None
        )
        self.deep = relu_mlp(width, config.mlp, config.dropout)
        self.out_features = 2 + width_out(width, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """(B, R, E) and (B, D) to (B, H)."""
        rows_BNE = embedded_BRE
        if self.dense_DE is not None:
            rows_BNE = torch.cat([embedded_BRE, dense_BD.unsqueeze(2) * self.dense_DE], dim=1)
        start_BC = torch.cat([embedded_BRE.flatten(1), dense_BD], dim=1)
        return torch.cat(
            [self.first_order(start_BC), second_order(rows_BNE), self.deep(start_BC)], dim=1
        )


def second_order(rows_BNE: Tensor) -> Tensor:
    """Sum of the dot products of all pairs of rows, (B, N, E) to (B, 1).

    As (sum^2 - sum of squares) / 2 in every column: O(N E) in place of O(N^2 E) (Rendle,
    Factorization Machines, 2010).
    """
    pairs_BE = rows_BNE.sum(dim=1).square() - rows_BNE.square().sum(dim=1)
    return 0.5 * pairs_BE.sum(dim=1, keepdim=True)
