"""FinalMLP (arXiv 2304.00902): two MLPs over the same input, fused by a bilinear form with several
heads.

    z_s = 2 sigmoid(gate_s(z)) * z        z = [embeddings, dense]; z_s = z without gates
    o_s = MLP_s(z_s)                      s = 1, 2; cut into heads o_s1, o_s2, ...
    x   = [o_1, o_2, o_11^T W_1 o_21, o_12^T W_2 o_22, ...]

A linear head over x is the paper's fusion: b + w_1^T o_1 + w_2^T o_2 + the sum of the heads. The
paper conditions each gate on features chosen by hand (such as the user's or the item's); here both
gates read all features.

Shape suffixes as in `exfm_ray.models.backbone`; C = R E + D columns of z, K heads, I and J widths
of o_1 and o_2, or of one head of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exfm_ray.config.models import FinalMLPConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import fan_in_normal_, mlp_to, relu_mlp
from exfm_ray.models.layout import Inputs


class Gate(nn.Module):
    """2 sigmoid(MLP(z)) * z: scales every input by a factor between 0 and 2."""

    def __init__(self, config: FinalMLPConfig, width: int) -> None:
        super().__init__()
        self.mlp = mlp_to(width, config.gate_mlp, width, dropout=config.dropout)

    def forward(self, start_BC: Tensor) -> Tensor:
        """Map (B, C) to (B, C)."""
        gate_BC = 2 * torch.sigmoid(self.mlp(start_BC))
        return gate_BC * start_BC


class FinalMLP(Backbone):
    """Two MLPs and the values of their bilinear heads."""

    def __init__(self, config: FinalMLPConfig, inputs: Inputs) -> None:
        super().__init__()
        width = inputs.rows * config.dim + inputs.dense
        gate_1, gate_2 = _gate(config, width), _gate(config, width)
        self.stream_1 = nn.Sequential(gate_1, relu_mlp(width, config.mlp_1, config.dropout))
        self.stream_2 = nn.Sequential(gate_2, relu_mlp(width, config.mlp_2, config.dropout))

        width_1 = config.mlp_1[-1]
        width_2 = config.mlp_2[-1]
        self.heads = config.heads
        shape = (config.heads, width_1 // config.heads, width_2 // config.heads)
        # A head sums over I times J products: that is its fan-in.
        weight_KX = fan_in_normal_(torch.empty(shape).flatten(1))
        self.bilinear_KIJ = nn.Parameter(weight_KX.view(shape))
        self.out_features = width_1 + width_2 + config.heads

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """Map (B, R, E) and (B, D) to (B, H)."""
        start_BC = torch.cat([embedded_BRE.flatten(1), dense_BD], dim=1)
        first_BI = self.stream_1(start_BC)
        second_BJ = self.stream_2(start_BC)

        first_BKI = first_BI.unflatten(1, (self.heads, -1))
        second_BKJ = second_BJ.unflatten(1, (self.heads, -1))
        mapped_BKJ = torch.einsum("bki,kij->bkj", first_BKI, self.bilinear_KIJ)
        fused_BK = (mapped_BKJ * second_BKJ).sum(dim=2)
        return torch.cat([first_BI, second_BJ, fused_BK], dim=1)


def _gate(config: FinalMLPConfig, width: int) -> nn.Module:
    return Gate(config, width) if config.gate_mlp else nn.Identity()
