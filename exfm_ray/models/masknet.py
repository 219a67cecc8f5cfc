"""MaskNet (arXiv 2102.07619), parallel form: blocks that see the embeddings through masks computed
from the example itself.

    mask  = W_2 relu(W_1 z + b_1) + b_2                           z = [embeddings, dense], raw
    block = relu( LN( W (mask * [LN(e_1), ..., LN(e_R), dense]) ) )
    x     = MLP([block_1, ..., block_n])

Every block has its own weights. Each row's layer norm has its own gain and bias, which all blocks
share. Dense features, which the paper embeds, enter as numbers and without a norm: the layer norm
of a scaled row would keep no more than the number's sign.

Shape suffixes as in `exfm_ray.models.backbone`; C = R E + D columns of z.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exfm_ray.config.models import MaskNetConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import fan_in_normal_, mlp_to, relu_mlp, width_out
from exfm_ray.models.layout import Inputs


class MaskBlock(nn.Module):
    """One block, (B, C) twice to (B, block_width). W has no bias: the layer norm has one."""

    def __init__(self, config: MaskNetConfig, width: int) -> None:
        super().__init__()
        self.mask = mlp_to(width, config.mask_mlp, width, dropout=config.dropout)
        weight = torch.empty(config.block_width, width)
        self.weight = nn.Parameter(fan_in_normal_(weight))
        self.norm = nn.LayerNorm(config.block_width)

    def forward(self, start_BC: Tensor, normed_BC: Tensor) -> Tensor:
        """Compute the mask from `start_BC` and apply it to `normed_BC`."""
        masked_BC = self.mask(start_BC) * normed_BC
        mapped_BH = F.linear(masked_BC, self.weight)
        return F.relu(self.norm(mapped_BH))


class MaskNet(Backbone):
    """Blocks side by side, then an MLP."""

    def __init__(self, config: MaskNetConfig, inputs: Inputs) -> None:
        super().__init__()
        self.gain_RE = nn.Parameter(torch.ones(inputs.rows, config.dim))
        self.bias_RE = nn.Parameter(torch.zeros(inputs.rows, config.dim))

        width = inputs.rows * config.dim + inputs.dense
        blocks = [MaskBlock(config, width) for _ in range(config.blocks)]
        self.blocks = nn.ModuleList(blocks)

        merged = config.blocks * config.block_width
        self.mlp = relu_mlp(merged, config.mlp, config.dropout)
        self.out_features = width_out(merged, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """Map (B, R, E) and (B, D) to (B, H)."""
        standardized_BRE = F.layer_norm(embedded_BRE, embedded_BRE.shape[-1:])
        normed_BRE = standardized_BRE * self.gain_RE + self.bias_RE

        start_BC = torch.cat([embedded_BRE.flatten(1), dense_BD], dim=1)
        normed_BC = torch.cat([normed_BRE.flatten(1), dense_BD], dim=1)
        blocks = [block(start_BC, normed_BC) for block in self.blocks]
        x_BH: Tensor = self.mlp(torch.cat(blocks, dim=1))
        return x_BH
