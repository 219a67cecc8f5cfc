"""The rows of width E that an interaction model reads, and the ids that each of them comes from.

Rows are in the order of the features (*schema.single, *schema.bags). A feature usually has one row.
It has several if its table has several embeddings per id; a sequence that the model reads unpooled
has them for each of its positions, the newest first. The row of an absent value (an empty bag, a
position beyond a sequence's length) is zero.

Shape suffixes as in `exfm_ray.data.batch`; O slots of bags.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """The rows of an unpooled sequence.

    Attributes:
        first: the first row.
        length: number of positions.
        width: rows per position.
        target: first of the `width` rows of the single-valued feature whose table it shares.
    """

    first: int
    length: int
    width: int
    target: int


class Inputs(NamedTuple):
    """The inputs for which an interaction model is built.

    Attributes:
        rows: R, number of embedded rows.
        dense: D, number of dense features.
        sequences: the sequences that the model reads unpooled.
    """

    rows: int
    dense: int
    sequences: tuple[SequenceRows, ...] = ()


@dataclass(frozen=True)
class Slot:
    """One value of a feature, or the mean of its values, as rows of the model's input.

    Attributes:
        feature: the feature.
        position: position counted from the newest value, or POOLED for the mean.
        first: its first row.
        width: number of its rows.
    """

    feature: SparseFeature
    position: int
    first: int
    width: int

    @property
    def table(self) -> str:
        """The embedding table that the slot reads."""
        return table_of(self.feature)

    @property
    def key(self) -> str:
        """The name of the slot.

        A colon separates the position, because no feature's name has one. TorchRec would take an
        "@" for the start of a table's name.
        """
        if self.position == POOLED:
            return self.feature.name
        return f"{self.feature.name}:{self.position}"


@dataclass(frozen=True)
class Layout:
    """The slots of a model in the order of the rows.

    Attributes:
        single: slots of the single-valued features, which come first.
        bags: slots of the multi-valued features and sequences.
        bag_of_O: for each slot of `bags`, the number of its bag.
        embeddings: table -> embeddings per id.
    """

    single: tuple[Slot, ...]
    bags: tuple[Slot, ...]
    bag_of_O: tuple[int, ...]
    embeddings: dict[str, int]

    @classmethod
    def from_config(cls, config: ModelConfig, schema: Schema) -> Self:
        """Lay out a model over a schema.

        Raises:
            ValueError: the model names a table that the schema does not have.
        """
        embeddings = _embeddings(config, schema)
        first_row = 0

        single: list[Slot] = []
        for feature in schema.single:
            width = embeddings[table_of(feature)]
            single.append(Slot(feature, POOLED, first_row, width))
            first_row += width

        bags: list[Slot] = []
        bag_of_O: list[int] = []
        for bag, feature in enumerate(schema.bags):
            width = embeddings[table_of(feature)]
            for position in _positions(config, feature):
                bags.append(Slot(feature, position, first_row, width))
                bag_of_O.append(bag)
                first_row += width
        return cls(tuple(single), tuple(bags), tuple(bag_of_O), embeddings)

    @property
    def rows(self) -> int:
        """R, the number of embedded rows."""
        slots = (*self.single, *self.bags)
        return sum(slot.width for slot in slots)

    def inputs(self, dense: int) -> Inputs:
        """The inputs for which the model is built, with `dense` dense features.

        Raises:
            ValueError: no single-valued feature reads the table of an unpooled sequence.
        """
        lengths: dict[str, int] = {}
        for slot in self.bags:
            lengths[slot.feature.name] = lengths.get(slot.feature.name, 0) + 1

        sequences = []
        for slot in self.bags:
            if slot.position == 0:
                target = self._target(slot)
                length = lengths[slot.feature.name]
                sequences.append(SequenceRows(slot.first, length, slot.width, target))
        return Inputs(self.rows, dense, tuple(sequences))

    def _target(self, sequence: Slot) -> int:
        """The first row of the single-valued feature that reads the table of a sequence."""
        for slot in self.single:
            if slot.table == sequence.table:
                return slot.first
        raise ValueError(
            f"sequence feature '{sequence.feature.name}' has no target: no single-valued feature "
            f"reads its table '{sequence.table}'; "
            "give it the `table` of the feature that it is a history of"
        )


def table_of(feature: SparseFeature) -> str:
    """The embedding table that a feature reads: a shared one, or the table of its own name."""
    return feature.table or feature.name


def _embeddings(config: ModelConfig, schema: Schema) -> dict[str, int]:
    """Table -> embeddings per id, for all tables of the schema."""
    for table in config.embeddings:
        if table not in schema.tables:
            listed = f" There are {', '.join(schema.tables)}."
            hint = nearest(table, schema.tables) or listed
            raise ValueError(f"embeddings: no table is named '{table}'.{hint}")
    return {table: config.embeddings.get(table, 1) for table in schema.tables}


def _positions(config: ModelConfig, feature: SparseFeature) -> Sequence[int]:
    """The positions of a bag that the model reads one by one, or POOLED."""
    if feature.kind is not Kind.SEQUENCE:
        return (POOLED,)
    unpooled = min(config.unpooled, feature.max_length)
    return range(unpooled) if unpooled else (POOLED,)


def expand_bags(
    values_V: Tensor,
    lengths_MB: Tensor,
    bag_of_O: Tensor,
    position_O: Tensor,
) -> tuple[Tensor, Tensor]:
    """Turn bags into slots.

    Slot o holds all values of bag `bag_of_O[o]`, or the value at `position_O[o]` counted from the
    newest.

    Returns:
        values_W and lengths_OB, in the form of `Batch.bag_values_V` and `Batch.bag_lengths_MB`; a
        length is 0 for a position beyond the end of its bag.
    """
    starts_MB = _starts(lengths_MB)
    bag_start_OB = starts_MB[bag_of_O]
    bag_length_OB = lengths_MB[bag_of_O]

    position_O1 = position_O[:, None]
    pooled_O1 = position_O1 == POOLED
    has_position_OB = (bag_length_OB > position_O1).to(bag_length_OB.dtype)
    length_OB = torch.where(pooled_O1, bag_length_OB, has_position_OB)

    newest_OB = bag_start_OB + bag_length_OB - 1
    source_OB = torch.where(pooled_O1, bag_start_OB, newest_OB - position_O1)
    shift_OB = source_OB - _starts(length_OB)
    index_W = torch.repeat_interleave(shift_OB.flatten(), length_OB.flatten())
    index_W += torch.arange(len(index_W), device=index_W.device)
    return values_V[index_W], length_OB


def _starts(lengths_XB: Tensor) -> Tensor:
    """Where each bag starts in the flat list of values."""
    lengths = lengths_XB.flatten()
    starts = lengths.cumsum(0) - lengths
    return starts.view_as(lengths_XB)
