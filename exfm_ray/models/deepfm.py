"""DeepFM (arXiv 1703.04247): a factorization machine beside an MLP over the same embeddings.

    x = [ <w, z> + b,  sum over i < j of <v_i, v_j>,  MLP(z) ]        z = [embeddings, dense]

The v_i are the embedded rows and, for each dense feature d, its value times a learned row: x_d V_d.
The paper gives every id a first-order weight of its own. Here that weight is a linear form of the
id's embedded row, another form w_i for every row: there is no second table of width 1 to shard,
store and score with. The serving head adds up the three parts.

Shape suffixes as in `exfm_ray.models.backbone`; C = R E + D columns of z, N = R + D rows v_i.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exfm_ray.config.models import DeepFMConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import linear, relu_mlp, width_out
from exfm_ray.models.layout import Inputs


class DeepFM(Backbone):
    """x = [first order, second order, MLP]: two columns, then the columns of the MLP."""

    dense_DE: nn.Parameter | None

    def __init__(self, config: DeepFMConfig, inputs: Inputs) -> None:
        super().__init__()
        width = inputs.rows * config.dim + inputs.dense
        self.first_order = linear(width, 1)
        if inputs.dense:
            rows_DE = torch.empty(inputs.dense, config.dim)
            rows_DE.normal_(0.0, config.init_std)
            self.dense_DE = nn.Parameter(rows_DE)
        else:
            self.dense_DE = None
        self.deep = relu_mlp(width, config.mlp, config.dropout)
        self.out_features = 2 + width_out(width, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """Map (B, R, E) and (B, D) to (B, H)."""
        rows_BNE = embedded_BRE
        if self.dense_DE is not None:
            dense_BDE = dense_BD.unsqueeze(2) * self.dense_DE
            rows_BNE = torch.cat([embedded_BRE, dense_BDE], dim=1)

        start_BC = torch.cat([embedded_BRE.flatten(1), dense_BD], dim=1)
        first_B1 = self.first_order(start_BC)
        second_B1 = second_order(rows_BNE)
        deep_BH = self.deep(start_BC)
        return torch.cat([first_B1, second_B1, deep_BH], dim=1)


def second_order(rows_BNE: Tensor) -> Tensor:
    """Sum the dot products of all pairs of rows, (B, N, E) to (B, 1).

    Computed as (sum^2 - sum of squares) / 2 in every column: O(N E) instead of O(N^2 E) (Rendle,
    Factorization Machines, 2010).
    """
    square_of_sum_BE = rows_BNE.sum(dim=1).square()
    sum_of_squares_BE = rows_BNE.square().sum(dim=1)
    pairs_BE = square_of_sum_BE - sum_of_squares_BE
    return 0.5 * pairs_BE.sum(dim=1, keepdim=True)
