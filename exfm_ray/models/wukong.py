"""Wukong (arXiv 2403.02545): stacked factorization machines whose interaction order doubles with
every layer.

    X' = LN( concat( FMB(X), LCB(X) ) + R(X) )            X (n, E) to X' (n_F + n_L, E), LN over E
    FMB(X) = reshape( MLP( LN( flatten( FM(X) ) ) ) )     n_F rows
    FM(X)  = X (X^T Y)                                    Y (n, k), k <= n: all pairs in O(n k)
    LCB(X) = W X                                          n_L rows, W (n_L, n), no bias
    R(X)   = X where n = n_F + n_L, otherwise P X         P (n_F + n_L, n)

Y is a parameter ("learnable"), or MLP(LN(flatten(W X))) with W of few rows ("attentive"), or left
out: X X^T, O(n^2) ("plain").

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
"""Epsilon of the layer norms inside FMB. FM(X) is quadratic in embeddings that start small: at a
standard deviation of 0.01 its variance is about 3e-7, which torch's default 1e-5 would hide."""


class RowMix(nn.Module):
    """Linear combinations of the rows, W X, without bias.

    `weight` is (rows out, rows in), so the fan-in is its last axis.
    """

    def __init__(self, rows_in: int, rows_out: int) -> None:
        super().__init__()
        weight = torch.empty(rows_out, rows_in)
        self.weight = nn.Parameter(fan_in_normal_(weight))

    def forward(self, x_BNE: Tensor) -> Tensor:
        """Map (B, N, E) to (B, rows out, E)."""
        # torch.matmul would make one product of the batch and transpose X for it: on a CPU the
        # whole model is 1.1 to 1.3 times slower.
        examples = x_BNE.shape[0]
        weight_BON = self.weight.expand(examples, -1, -1)
        return torch.bmm(weight_BON, x_BNE)


class AttentiveProjection(nn.Module):
    """Y^T X for a Y that is computed from the example.

    Y = MLP(LN(flatten(W X))) with W (`attentive_rows`, n).
    """

    def __init__(
        self,
        config: WukongConfig,
        rows: int,
        columns: int,
    ) -> None:
        super().__init__()
        compressed_rows = min(config.attentive_rows, rows)
        width = compressed_rows * config.dim
        self.compress = RowMix(rows, compressed_rows)
        self.norm = nn.LayerNorm(width, EPSILON)

        # Y starts at the scale of RowMix's weight, 1 / sqrt(n), because norm and ReLU layers put
        # out a second moment of 1. Half of its variance is a bias, equal for all examples: without
        # it gradients grow fivefold from 2 to 16 layers.
        scale = (2 * rows) ** -0.5
        hidden_width = width_out(width, config.attentive_mlp)
        last = linear(hidden_width, rows * columns, scale)
        nn.init.normal_(last.bias, std=scale)
        hidden = relu_mlp(width, config.attentive_mlp, config.dropout)
        self.mlp = nn.Sequential(*hidden, last)
        self.shape = (rows, columns)

    def forward(self, x_BNE: Tensor) -> Tensor:
        """Map (B, N, E) to (B, K, E)."""
        compressed_BC = self.compress(x_BNE).flatten(1)
        flat_y = self.mlp(self.norm(compressed_BC))
        y_BNK = flat_y.view(-1, *self.shape)
        return torch.bmm(y_BNK.transpose(1, 2), x_BNE)


class FactorizationMachineBlock(nn.Module):
    """FMB: factorization machine, layer norm, MLP, reshaped to n_F rows.

    `project` maps X to Y^T X, or to X itself if the factorization machine is plain.
    """

    def __init__(self, config: WukongConfig, rows: int) -> None:
        super().__init__()
        columns = rows if config.projection == "plain" else min(config.k, rows)
        self.project = projection(config, rows, columns)

        width = rows * columns
        size_out = config.n_F * config.dim
        self.norm = nn.LayerNorm(width, EPSILON)
        self.mlp = mlp_to(width, config.fmb_mlp, size_out, dropout=config.dropout)
        self.shape = (config.n_F, config.dim)

    def forward(self, x_BNE: Tensor) -> Tensor:
        """Map (B, N, E) to (B, n_F, E)."""
        projected_BKE = self.project(x_BNE)
        fm_BNK = torch.bmm(x_BNE, projected_BKE.transpose(1, 2))
        normed = self.norm(fm_BNK.flatten(1))
        rows: Tensor = self.mlp(normed)
        return rows.view(-1, *self.shape)


def projection(
    config: WukongConfig,
    rows: int,
    columns: int,
) -> nn.Module:
    """Build the module of `config.projection`, (B, N, E) to (B, K, E)."""
    if config.projection == "learnable":
        return RowMix(rows, columns)
    if config.projection == "attentive":
        return AttentiveProjection(config, rows, columns)
    return nn.Identity()


class WukongLayer(nn.Module):
    """One layer, (B, N, E) to (B, n_F + n_L, E)."""

    def __init__(self, config: WukongConfig, rows: int) -> None:
        super().__init__()
        rows_out = config.n_F + config.n_L
        self.fmb = FactorizationMachineBlock(config, rows) if config.n_F else None
        self.lcb = RowMix(rows, config.n_L) if config.n_L else None
        self.residual = nn.Identity() if rows == rows_out else RowMix(rows, rows_out)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x_BNE: Tensor) -> Tensor:
        """Map X to LN(concat(FMB(X), LCB(X)) + R(X))."""
        blocks = []
        if self.fmb is not None:
            blocks.append(self.fmb(x_BNE))
        if self.lcb is not None:
            blocks.append(self.lcb(x_BNE))

        blocks_BOE = torch.cat(blocks, dim=1)
        residual_BOE = self.residual(x_BNE)
        y_BOE: Tensor = self.norm(blocks_BOE + residual_BOE)
        return y_BOE


class Wukong(Backbone):
    """l layers over the embedded features and `dense_rows` rows computed from the dense features;
    then flatten and MLP."""

    def __init__(self, config: WukongConfig, inputs: Inputs) -> None:
        super().__init__()
        rows = inputs.rows
        if inputs.dense:
            rows += config.dense_rows
        if config.n_F and config.projection != "plain" and config.k > rows:
            raise ValueError(
                f"model.k is {config.k}, above the {rows} rows of the input: the projection "
                f"compresses rows, set k to {rows} or less"
            )

        self.dense = _dense_to_rows(config, inputs.dense) if inputs.dense else None
        self.dense_shape = (config.dense_rows, config.dim)

        rows_out = config.n_F + config.n_L
        layers = [WukongLayer(config, rows)]
        for _ in range(config.l - 1):
            layers.append(WukongLayer(config, rows_out))
        self.layers = nn.Sequential(*layers)

        width = rows_out * config.dim
        self.mlp = relu_mlp(width, config.mlp, config.dropout)
        self.out_features = width_out(width, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """Map (B, R, E) and (B, D) to (B, H)."""
        x_BNE = embedded_BRE
        if self.dense is not None:
            dense_rows = self.dense(dense_BD).view(-1, *self.dense_shape)
            x_BNE = torch.cat([x_BNE, dense_rows], dim=1)

        y_BOE = self.layers(x_BNE)
        x_BH: Tensor = self.mlp(y_BOE.flatten(1))
        return x_BH


def _dense_to_rows(config: WukongConfig, dense: int) -> nn.Sequential:
    """Build the MLP from `dense` features to `dense_rows` rows.

    The rows start at the scale of the embeddings: the layer norm inside FMB spans all rows, and
    larger rows would drown the embeddings.
    """
    size = config.dense_rows * config.dim
    return mlp_to(dense, (size,), size, config.init_std, config.dropout)
