"""MaskNet (arXiv 2102.07619), parallel form: blocks that see the embeddings through masks made from
the example itself.

    mask  = W_2 relu(W_1 z + b_1) + b_2                               z = [embeddings, dense], not normalised
    block = relu( LN( W (mask * [LN(e_1), ..., LN(e_R), dense]) ) )   every block with weights of
    its own
    x     = MLP([block_1, ..., block_n])

Each row's layer norm has a gain and a bias of its own, and all blocks share it. Dense features,
which the paper embeds, enter as numbers and without a norm: the layer norm of a scaled row would
keep no more than the number's sign.
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
    """One block, (B, C) twice to (B, block_width). W has no bias: the layer norm brings one."""

    def __init__(self, config: MaskNetConfig, width: int) -> None:
        super().__init__()
        self.mask = mlp_to(width, config.mask_mlp, width, dropout=config.dropout)
        self.weight = nn.Parameter(fan_in_normal_(torch.empty(config.block_width, width)))
        self.norm = nn.LayerNorm(config.block_width)

    def forward(self, start_BC: Tensor, normed_BC: Tensor) -> Tensor:
        """The mask is computed from `start_BC` and laid over `normed_BC`."""
        return F.relu(self.norm(F.linear(self.mask(start_BC) * normed_BC, self.weight)))


class MaskNet(Backbone):
    """Blocks side by side, then an MLP."""

    def __init__(self, config: MaskNetConfig, inputs: Inputs) -> None:
        super().__init__()
        width = inputs.rows * config.dim + inputs.dense
        merged = config.blocks * config.block_width
        self.gain_RE = nn.Parameter(torch.ones(inputs.rows, config.dim))
        self.bias_RE = nn.Parameter(torch.zeros(inputs.rows, config.dim))
        self.blocks = nn.ModuleList(MaskBlock(config, width) for _ in range(config.blocks))
        self.mlp = relu_mlp(merged, config.mlp, config.dropout)
        self.out_features = width_out(merged, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """(B, R, E) and (B, D) to (B, H)."""
        normed_BRE = (
            F.layer_norm(embedded_BRE, embedded_BRE.shape[-1:]) * self.gain_RE + self.bias_RE
        )
        start_BC = torch.cat([embedded_BRE.flatten(1), dense_BD], dim=1)
        normed_BC = torch.cat([normed_BRE.flatten(1), dense_BD], dim=1)
        x_BH: Tensor = self.mlp(
            torch.cat([block(start_BC, normed_BC) for block in self.blocks], dim=1)
        )
        return x_BH
