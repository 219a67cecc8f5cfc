"""DIN (arXiv 1706.06978): a sequence is read value by value, each weighted by its relevance to the
target.

    a_j = MLP([e_j, t, e_j - t, e_j * t])       e_j value j of the sequence
    s   = a_1 e_1 + ... + a_L e_L               no softmax: the sum keeps how strong the interest is
    x   = MLP([other rows, s of every sequence, dense])

The target t is the single-valued feature whose table the sequence shares. A position beyond the end
of its sequence is a zero row, whatever its weight. The activation is a ReLU where the paper has
Dice, whose batch statistics would make an example's prediction depend on its neighbors.

Shape suffixes as in `exfm_ray.models.backbone`; L positions of a sequence, X = rows of a value
times E, O rows that belong to no sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exfm_ray.config.models import DINConfig
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.layers import mlp_to, relu_mlp, width_out
from exfm_ray.models.layout import Inputs, SequenceRows


class Attention(nn.Module):
    """The activation unit of one sequence and its weighted sum, (B, R, E) to (B, X)."""

    def __init__(self, config: DINConfig, rows: SequenceRows) -> None:
        super().__init__()
        self.values = slice(rows.first, rows.first + rows.length * rows.width)
        self.target = slice(rows.target, rows.target + rows.width)
        value_width = rows.width * config.dim
        self.shape = (rows.length, value_width)
        self.unit = mlp_to(4 * value_width, config.attention_mlp, 1, dropout=config.dropout)

    def forward(self, embedded_BRE: Tensor) -> Tensor:
        """Weigh and sum all positions at once."""
        value_BLX = embedded_BRE[:, self.values].reshape(-1, *self.shape)
        target_B1X = embedded_BRE[:, self.target].flatten(1).unsqueeze(1)
        target_BLX = target_B1X.expand_as(value_BLX)

        difference_BLX = value_BLX - target_BLX
        product_BLX = value_BLX * target_BLX
        unit_inputs = torch.cat([value_BLX, target_BLX, difference_BLX, product_BLX], dim=2)
        weight_BL1 = self.unit(unit_inputs)
        interest_BX: Tensor = (weight_BL1 * value_BLX).sum(dim=1)
        return interest_BX


class DIN(Backbone):
    """An attention for every sequence feature, then an MLP."""

    other_O: Tensor

    def __init__(self, config: DINConfig, inputs: Inputs) -> None:
        super().__init__()
        if not inputs.sequences:
            raise ValueError(
                "model.type is din, but the stream has no sequence feature; declare one (kind: "
                "sequence, sharing the table of the feature that it is a history of) or use a "
                "model that reads none, such as mlp"
            )
        attentions = [Attention(config, rows) for rows in inputs.sequences]
        self.attentions = nn.ModuleList(attentions)

        sequence_rows: set[int] = set()
        for attention in attentions:
            sequence_rows.update(range(attention.values.start, attention.values.stop))
        other = [row for row in range(inputs.rows) if row not in sequence_rows]
        other_O = torch.tensor(other, dtype=torch.int64)
        self.register_buffer("other_O", other_O, persistent=False)

        interest_rows = sum(rows.width for rows in inputs.sequences)
        width = (len(other) + interest_rows) * config.dim + inputs.dense
        self.mlp = relu_mlp(width, config.mlp, config.dropout)
        self.out_features = width_out(width, config.mlp)

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """Map (B, R, E) and (B, D) to (B, H)."""
        other_BOE = embedded_BRE.index_select(1, self.other_O)
        # Each sequence feature has its own unit and length, so it needs its own pass, which covers
        # all of its positions.
        interests = [attention(embedded_BRE) for attention in self.attentions]
        start_BC = torch.cat([other_BOE.flatten(1), *interests, dense_BD], dim=1)
        x_BH: Tensor = self.mlp(start_BC)
        return x_BH
