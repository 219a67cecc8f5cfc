"""DIN (arXiv 1706.06978): a sequence is read value by value, each weighted by what it says about
the target.

    a_j = MLP([e_j, t, e_j - t, e_j * t])       e_j value j of the sequence, t the target: the single-valued feature whose table it shares
    s   = a_1 e_1 + ... + a_L e_L               no softmax: the sum keeps how strong the interest is
    x   = MLP([other rows, s of every sequence, dense])

A position beyond the end of its sequence is a zero row, whatever weight it is given. The activation
is a ReLU where the paper has Dice, whose batch statistics would make an example's prediction depend
on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exfm_ray.config.models import DINConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import mlp_to, relu_mlp, width_out
from exfm_ray.models.layout import Inputs, SequenceRows


class Attention(nn.Module):
    """The activation unit of one sequence and its weighted sum: (B, R, E) to (B, X), X = rows of a
    value times E."""

    def __init__(self, config: DINConfig, rows: SequenceRows) -> None:
        super().__init__()
        self.values = slice(rows.first, rows.first + rows.length * rows.width)
        self.target = slice(rows.target, rows.target + rows.width)
        self.shape = (rows.length, rows.width * config.dim)
        self.unit = mlp_to(
            4 * rows.width * config.dim, config.attention_mlp, 1, dropout=config.dropout
        )

    def forward(self, embedded_BRE: Tensor) -> Tensor:
        """All positions at once."""
        value_BLX = embedded_BRE[:, self.values].reshape(-1, *self.shape)
        target_BLX = embedded_BRE[:, self.target].flatten(1).unsqueeze(1).expand_as(value_BLX)
        weight_BL1 = self.unit(
            torch.cat(
                [value_BLX, target_BLX, value_BLX - target_BLX, value_BLX * target_BLX], dim=2
            )
        )
        interest_BX: Tensor = (weight_BL1 * value_BLX).sum(dim=1)
        return interest_BX


class DIN(Backbone):
    """An attention for every sequence feature, then an MLP."""

    other_O: Tensor

    def __init__(self, config: DINConfig, inputs: Inputs) -> None:
        super().__init__()
        if not inputs.sequences:
            raise ValueError(
                "model.type is din, but the stream has no sequence feature; declare one (kind: sequence, sharing the table of the "
                "feature that it is a history of) or take a model that reads none, such as mlp"
            )
        self.attentions = nn.ModuleList(Attention(config, rows) for rows in inputs.sequences)
        read = {
            row
            for rows in inputs.sequences
            for row in range(rows.first, rows.first + rows.length * rows.width)
        }
        self.register_buffer(
            "other_O",
            torch.tensor([row for row in range(inputs.rows) if row not in read], dtype=torch.int64),
            persistent=False,
        )
        width = (
            len(self.other_O) + sum(rows.width for rows in inputs.sequences)
        ) * config.dim + inputs.dense
        self.mlp = relu_mlp(width, config.mlp, config.dropout)
        self.out_features = width_out(width, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """(B, R, E) and (B, D) to (B, H)."""
        other_BOE = embedded_BRE.index_select(1, self.other_O)
        # Each sequence feature has its own unit and length: one pass for each, over all of its
        # positions.
        interests = [attention(embedded_BRE) for attention in self.attentions]
        x_BH: Tensor = self.mlp(torch.cat([other_BOE.flatten(1), *interests, dense_BD], dim=1))
        return x_BH
