"""Wukong (arXiv 2403.02545): stacked factorization machines whose interaction order doubles with
every layer.

    X' = LN( concat( FMB(X), LCB(X) ) + R(X) )            X (n, E) to X' (n_F + n_L, E), LN over E
    FMB(X) = reshape( MLP( LN( flatten( FM(X) ) ) ) )     n_F rows
    FM(X)  = X (X^T Y)                                    Y (n, k), k <= n: all pairs in O(n k) instead of O(n^2)
    LCB(X) = W X                                          n_L rows, W (n_L, n), no bias
    R(X)   = X where n = n_F + n_L, otherwise P X         P (n_F + n_L, n)

Y is a parameter ("learnable"), or MLP(LN(flatten(W X))) with W of few rows ("attentive"), or left
out: X X^T ("plain").

Shape suffixes beside those of `exfm_ray.data.batch`: N rows in, O = n_F + n_L rows out, K columns
of FM(X), H features out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exfm_ray.config.models import WukongConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import fan_in_normal_, linear, mlp_to, relu_mlp, width_out
from exfm_ray.models.layout import Inputs

EPSILON = 1e-12
"""Of the layer norms inside FMB. FM(X) is quadratic in embeddings that start small: at a standard
deviation of 0.01 its variance is about 3e-7, which torch's own 1e-5 would hide."""


class RowMix(nn.Module):
    """Linear combinations of the rows, W X, without bias; `weight` is (rows out, rows in): the
    fan-in is its last axis."""

    def __init__(self, rows_in: int, rows_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(fan_in_normal_(torch.empty(rows_out, rows_in)))

    def forward(self, x_BNE: Tensor) -> Tensor:
        """(B, N, E) to (B, rows out, E)."""
        # torch.matmul would make one product of the batch and transpose X for it: on a CPU the
        # whole model is 1.1 to 1.3 times slower.
        return torch.bmm(self.weight.expand(x_BNE.shape[0], -1, -1), x_BNE)


class AttentiveProjection(nn.Module):
    """Y^T X for a Y that is computed from the example, MLP(LN(flatten(W X))) with W
    (`attentive_rows`, n)."""

    def __init__(
        self,
        config: WukongConfig,
        rows: int,
        columns: int,
    ) -> None:
        super().__init__()
        compressed = min(config.attentive_rows, rows)
        width = compressed * config.dim
        self.compress = RowMix(rows, compressed)
        self.norm = nn.LayerNorm(width, EPSILON)
        # Y starts at the scale of RowMix's weight, 1 / sqrt(n), for norm and ReLU layers put out a
        # second moment of 1. Half of its variance is a bias, alike for all examples: without it
        # gradients grow fivefold from 2 to 16 layers.
        scale = (2 * rows) ** -0.5
        last = linear(width_out(width, config.attentive_mlp), rows * columns, scale)
        nn.init.normal_(last.bias, std=scale)
        self.mlp = nn.Sequential(*relu_mlp(width, config.attentive_mlp, config.dropout), last)
        self.shape = (rows, columns)

    def forward(self, x_BNE: Tensor) -> Tensor:
        """(B, N, E) to (B, K, E)."""
        y_BNK = self.mlp(self.norm(self.compress(x_BNE).flatten(1))).view(-1, *self.shape)
        return torch.bmm(y_BNK.transpose(1, 2), x_BNE)


class FactorizationMachineBlock(nn.Module):
    """FMB: FM, layer norm, MLP, n_F rows. `project` maps X to Y^T X, or to X itself where the FM is
    plain."""

    def __init__(self, config: WukongConfig, rows: int) -> None:
        super().__init__()
        columns = rows if config.projection == "plain" else min(config.k, rows)
        self.project = projection(config, rows, columns)
        self.norm = nn.LayerNorm(rows * columns, EPSILON)
        self.mlp = mlp_to(
            rows * columns, config.fmb_mlp, config.n_F * config.dim, dropout=config.dropout
        )
        self.shape = (config.n_F, config.dim)

    def forward(self, x_BNE: Tensor) -> Tensor:
        """(B, N, E) to (B, n_F, E)."""
        fm_BNK = torch.bmm(x_BNE, self.project(x_BNE).transpose(1, 2))
        rows: Tensor = self.mlp(self.norm(fm_BNK.flatten(1)))
        return rows.view(-1, *self.shape)


def projection(
    config: WukongConfig,
    rows: int,
    columns: int,
) -> nn.Module:
    """The module of `config.projection` for (B, N, E) to (B, K, E)."""
    if config.projection == "learnable":
        return RowMix(rows, columns)
    return (
        AttentiveProjection(config, rows, columns)
        if config.projection == "attentive"
        else nn.Identity()
    )


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
    """l layers over the embedded features and `dense_rows` rows made of the dense features; then
    flatten and MLP."""

    def __init__(self, config: WukongConfig, inputs: Inputs) -> None:
        super().__init__()
        dense = inputs.dense
        rows = inputs.rows + (config.dense_rows if dense else 0)
        out = config.n_F + config.n_L
        if config.n_F and config.projection != "plain" and config.k > rows:
            raise ValueError(
                f"model.k is {config.k}, above the {rows} rows of the input: the projection compresses rows, set k to {rows} or less"
            )
        size = config.dense_rows * config.dim
        # The layer norm inside FMB spans all rows: rows of dense features start at the scale of the
        # embeddings, or they drown them.
        self.dense = (
            mlp_to(dense, (size,), size, config.init_std, config.dropout) if dense else None
        )
        self.dense_shape = (config.dense_rows, config.dim)
        self.layers = nn.Sequential(
            *(WukongLayer(config, n) for n in (rows, *[out] * (config.l - 1)))
        )
        self.mlp = relu_mlp(out * config.dim, config.mlp, config.dropout)
        self.out_features = width_out(out * config.dim, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """(B, R, E) and (B, D) to (B, H)."""
        x_BNE = embedded_BRE
        if self.dense is not None:
            x_BNE = torch.cat([x_BNE, self.dense(dense_BD).view(-1, *self.dense_shape)], dim=1)
        x_BH: Tensor = self.mlp(self.layers(x_BNE).flatten(1))
        return x_BH
