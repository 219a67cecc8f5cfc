"""Which rows of width E an interaction model is given, and from which ids each of them comes.

Rows are in the order of the features (*schema.single, *schema.bags). A feature has one row, as a
rule; it has several where its table has several embeddings for an id, and a sequence that the model
reads unpooled has them for each of its positions, the newest first. A row of an absent value (an
empty bag, a position beyond a sequence's length) is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from exfm_ray.config.models import ModelConfig
from exfm_ray.errors import nearest
from exfm_ray.schema import Kind, Schema, SparseFeature

POOLED = -1
"""Position of a slot that holds the mean of its bag."""


class SequenceRows(NamedTuple):
    """Rows of an unpooled sequence: `length` positions of `width` rows from row `first` on;
    `target`: first of the `width` rows of the single-valued feature whose table it shares."""

    first: int
    length: int
    width: int
    target: int


class Inputs(NamedTuple):
    """What an interaction model is built for: R embedded rows, D dense features, the sequences it
    reads unpooled."""

    rows: int
    dense: int
    sequences: tuple[SequenceRows, ...] = ()


@dataclass(frozen=True)
class Slot:
    """The place of one value of a feature, or of its mean (`position` POOLED), with `width` rows
    from row `first` on."""

    feature: SparseFeature
    position: int
    first: int
    width: int

    @property
    def table(self) -> str:
        """The embedding table that is read."""
        return self.feature.table or self.feature.name

    @property
    def key(self) -> str:
        """Names the slot. No feature's name has a colon; an "@" TorchRec would take for the start
        of a table's name."""
        return (
            self.feature.name if self.position == POOLED else f"{self.feature.name}:{self.position}"
        )


@dataclass(frozen=True)
class Layout:
    """The slots of a model, in the order of the rows: those of the single-valued features, then
    those of the bags."""

    single: tuple[Slot, ...]
    bags: tuple[Slot, ...]
    bag_of_O: tuple[int, ...]
    embeddings: dict[str, int]

    @classmethod
    def from_config(cls, config: ModelConfig, schema: Schema) -> Self:
        """The layout of a model over a schema. ValueError where the model names a table that the
        schema does not have."""
        for table in config.embeddings:
            if table not in schema.tables:
                known = nearest(table, schema.tables) or f" There are {', '.join(schema.tables)}."
                raise ValueError(f"embeddings: no table is named '{table}'.{known}")
        embeddings = {table: config.embeddings.get(table, 1) for table in schema.tables}
        first = 0
        slots: list[Slot] = []
        bag_of: list[int] = []
        for feature in (*schema.single, *schema.bags):
            unpooled = (
                min(config.unpooled, feature.max_length) if feature.kind is Kind.SEQUENCE else 0
            )
            for position in range(unpooled) if unpooled else (POOLED,):
                slots.append(
                    Slot(feature, position, first, embeddings[feature.table or feature.name])
                )
                first += slots[-1].width
                if feature.kind is not Kind.SINGLE:
                    bag_of.append(schema.bags.index(feature))
        singles = len(schema.single)
        return cls(tuple(slots[:singles]), tuple(slots[singles:]), tuple(bag_of), embeddings)

    @property
    def rows(self) -> int:
        """R."""
        return sum(slot.width for slot in (*self.single, *self.bags))

    def inputs(self, dense: int) -> Inputs:
        """What the model is built for. ValueError for an unpooled sequence whose table no
        single-valued feature reads."""
        targets = {slot.table: slot.first for slot in reversed(self.single)}
        sequences = []
        for slot in self.bags:
            if slot.position == 0:
                if slot.table not in targets:
                    raise ValueError(
                        f"sequence feature '{slot.feature.name}' has no target: no single-valued feature reads its table '{slot.table}'; "
                        "give it the `table` of the feature that it is a history of"
                    )
                length = sum(s.feature.name == slot.feature.name for s in self.bags)
                sequences.append(SequenceRows(slot.first, length, slot.width, targets[slot.table]))
        return Inputs(self.rows, dense, tuple(sequences))


def expand_bags(
    values_V: Tensor,
    lengths_MB: Tensor,
    bag_of_O: Tensor,
    position_O: Tensor,
) -> tuple[Tensor, Tensor]:
    """Bags as slots: slot o holds all values of bag `bag_of_O[o]`, or the one at `position_O[o]`
    counted from the newest.

    Returns:
        values_W and lengths_OB, in the form of `Batch.bag_values_V` and `Batch.bag_lengths_MB`; a
        length is 0 for a position beyond the end of its bag.
    """
    start_MB = (lengths_MB.flatten().cumsum(0) - lengths_MB.flatten()).view_as(lengths_MB)
    start_OB = start_MB[bag_of_O]
    length_OB = lengths_MB[bag_of_O]
    position_O1 = position_O[:, None]
    pooled_O1 = position_O1 == POOLED
    kept_OB = torch.where(pooled_O1, length_OB, (length_OB > position_O1).to(length_OB.dtype))
    first_OB = torch.where(pooled_O1, start_OB, start_OB + length_OB - 1 - position_O1)
    before_OB = (kept_OB.flatten().cumsum(0) - kept_OB.flatten()).view_as(kept_OB)
    index_W = torch.repeat_interleave((first_OB - before_OB).flatten(), kept_OB.flatten())
    index_W += torch.arange(len(index_W), device=index_W.device)
    return values_V[index_W], kept_OB
