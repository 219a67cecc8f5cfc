"""Wukong (arXiv 2403.02545): stacked factorization machines whose interaction order doubles with every layer.

    X' = LN( concat( FMB(X), LCB(X) ) + R(X) )            X (n, E) to X' (n_F + n_L, E), LN over E
    FMB(X) = reshape( MLP( LN( flatten( FM(X) ) ) ) )     n_F rows
    FM(X)  = X (X^T Y)                                    Y (n, k) learnable, k <= n: all pairs in O(n k) instead of O(n^2)
    LCB(X) = W X                                          n_L rows, W (n_L, n), no bias
    R(X)   = X where n = n_F + n_L, otherwise P X         P (n_F + n_L, n)

Shape suffixes beside those of `exfm_ray.data.batch`: N rows in, O = n_F + n_L rows out, K the rank k, H features out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exfm_ray.model_config import WukongConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.embeddings import INIT_STD
from exfm_ray.models.layers import fan_in_normal_, mlp_to, relu_mlp, width_out
from exfm_ray.models.layout import Inputs


class RowMix(nn.Module):
    """Linear combinations of the rows, W X, without bias; `weight` is (rows out, rows in): the fan-in is its last axis."""

    def __init__(self, rows_in: int, rows_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(fan_in_normal_(torch.empty(rows_out, rows_in)))

    def forward(self, x_BNE: Tensor) -> Tensor:
        """(B, N, E) to (B, rows out, E)."""
        return torch.matmul(self.weight, x_BNE)


class FactorizationMachineBlock(nn.Module):
    """FMB: optimised FM, layer norm, MLP, n_F rows."""

    def __init__(self, config: WukongConfig, rows: int) -> None:
        super().__init__()
        self.project = RowMix(rows, config.k)  # Y^T
        self.norm = nn.LayerNorm(rows * config.k)
        self.mlp = mlp_to(rows * config.k, config.fmb_mlp, config.n_F * config.dim)
        self.shape = (config.n_F, config.dim)

    def forward(self, x_BNE: Tensor) -> Tensor:
        """(B, N, E) to (B, n_F, E)."""
        fm_BNK = torch.bmm(x_BNE, self.project(x_BNE).transpose(1, 2))
        rows: Tensor = self.mlp(self.norm(fm_BNK.flatten(1)))
        return rows.view(-1, *self.shape)


class WukongLayer(nn.Module):
    """One layer, (B, N, E) to (B, n_F + n_L, E)."""

    def __init__(self, config: WukongConfig, rows: int) -> None:
        super().__init__()
        out = config.n_F + config.n_L
        self.fmb = FactorizationMachineBlock(config, rows) if config.n_F else None
        self.lcb = RowMix(rows, config.n_L) if config.n_L else None
        self.residual = nn.Identity() if rows == out else RowMix(rows, out)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x_BNE: Tensor) -> Tensor:
        """X to LN(concat(FMB(X), LCB(X)) + R(X))."""
        blocks = [block(x_BNE) for block in (self.fmb, self.lcb) if block is not None]
        y_BOE: Tensor = self.norm(torch.cat(blocks, dim=1) + self.residual(x_BNE))
        return y_BOE


class Wukong(Backbone):
    """l layers over the embedded features and `dense_rows` rows made of the dense features; then flatten and MLP."""

    def __init__(self, config: WukongConfig, inputs: Inputs) -> None:
        super().__init__()
        dense = inputs.dense
        rows, out = inputs.rows + (config.dense_rows if dense else 0), config.n_F + config.n_L
        rows_of_layers = [rows, *[out] * (config.l - 1)]
        if config.n_F and config.k > min(rows_of_layers):
            layer = next(i for i, n in enumerate(rows_of_layers) if n < config.k)
            raise ValueError(
                f"model.k is {config.k}, above the {rows_of_layers[layer]} rows that enter layer {layer + 1}: "
                f"the projection compresses rows, set k to {min(rows_of_layers)} or less"
            )
        size = config.dense_rows * config.dim
        # The layer norm inside FMB spans all rows: rows of dense features start at the scale of the embeddings, or they drown them.
        self.dense = mlp_to(dense, (size,), size, gain=INIT_STD) if dense else None
        self.dense_shape = (config.dense_rows, config.dim)
        self.layers = nn.Sequential(*(WukongLayer(config, n) for n in rows_of_layers))
        self.mlp = relu_mlp(out * config.dim, config.mlp)
        self.out_features = width_out(out * config.dim, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """(B, R, E) and (B, D) to (B, H)."""
        x_BNE = embedded_BRE
        if self.dense is not None:
            x_BNE = torch.cat([x_BNE, self.dense(dense_BD).view(-1, *self.dense_shape)], dim=1)
        x_BH: Tensor = self.mlp(self.layers(x_BNE).flatten(1))
        return x_BH
