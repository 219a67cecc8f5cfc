"""Embedding tables in plain torch: for one device, for export, and for reading stored tables.

The engine trains with TorchRec's tables. Rows are in the order of `exfm_ray.models.layout`.

Shape suffixes as in `exfm_ray.data.batch`; R embedded rows, E their width, O slots of bags.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exfm_ray.config.models import ModelConfig
from exfm_ray.data.batch import Batch
from exfm_ray.models.layout import POOLED, Layout, Slot, expand_bags
from exfm_ray.schema import Schema

INIT_STD = 0.05
"""Standard deviation of a fresh row by default. It is as large as one step of row-wise Adagrad at
the default rate (the first step has a root mean square of `table_lr` = 0.05 whatever the
gradient), so one event is enough to distinguish an id from its random start."""

BLOCK_ROWS = 65_536
"""Rows drawn from one generator. Part of the definition of the initial tables: another value gives
other tables."""


def initial_table(
    name: str,
    rows: int,
    dim: int,
    seed: int,
    first_row: int = 0,
    last_row: int | None = None,
    std: float = INIT_STD,
) -> Tensor:
    """Rows [first_row, last_row) of the fresh table `name`, float32 (last_row - first_row, dim).

    A row depends only on (seed, name, rows, dim, std), not on the requested slice, so each worker
    of a row-wise sharded table makes its own rows and every sharding starts alike. Row 0, the
    missing value, is a row like any other.
    """
    last = rows if last_row is None else last_row
    if not 0 <= first_row <= last <= rows:
        raise ValueError(f"rows [{first_row}, {last}) of table '{name}', which has {rows} rows")

    table = torch.empty(last - first_row, dim)
    first_block_start = first_row - first_row % BLOCK_ROWS
    for start in range(first_block_start, last, BLOCK_ROWS):
        block = _initial_block(name, start, rows, dim, seed, std)
        low = max(first_row, start)
        high = min(last, start + len(block))
        table[low - first_row : high - first_row] = block[low - start : high - start]
    return table


def initial_rows(
    name: str,
    rows: int,
    dim: int,
    seed: int,
    row_X: np.ndarray[Any, Any],
    std: float = INIT_STD,
) -> Tensor:
    """Some rows of `initial_table`, float32 (X, dim).

    Args:
        row_X: row numbers, int64 in ascending order.
    """
    if not len(row_X):
        return torch.empty(0, dim)

    block_numbers, first_positions = np.unique(row_X // BLOCK_ROWS, return_index=True)
    rows_by_block = np.split(row_X, first_positions[1:])
    parts = []
    for block_number, block_row_X in zip(block_numbers.tolist(), rows_by_block, strict=True):
        start = block_number * BLOCK_ROWS
        block = _initial_block(name, start, rows, dim, seed, std)
        parts.append(block[torch.from_numpy(block_row_X - start)])
    return torch.cat(parts)


def _initial_block(
    name: str,
    start: int,
    rows: int,
    dim: int,
    seed: int,
    std: float,
) -> Tensor:
    """The block of a table of `rows` rows that begins at row `start`."""
    key = f"{seed}/{name}/{start // BLOCK_ROWS}"
    digest = hashlib.sha256(key.encode()).digest()
    block_seed = int.from_bytes(digest[:8], "big") >> 1
    generator = torch.Generator().manual_seed(block_seed)
    block_rows = min(BLOCK_ROWS, rows - start)
    return torch.empty(block_rows, dim).normal_(0.0, std, generator=generator)


class LocalTables(nn.Module):
    """All tables stacked in one parameter; a slot's ids are shifted by the offset of its table.

    So neither the single-valued features nor the bags need a loop: one gather for the former, one
    `embedding_bag` for the latter. A table with several embeddings per id holds them in
    consecutive rows.

    Attributes:
        weight: float32 (sum over the tables of rows times embeddings, E).
    """

    single_S: Tensor
    single_scale_S: Tensor
    single_offset_S: Tensor
    bag_O: Tensor
    position_O: Tensor
    bag_scale_O: Tensor
    bag_offset_O: Tensor

    def __init__(
        self,
        schema: Schema,
        config: ModelConfig,
        seed: int | None,
        sparse: bool = False,
        held: bool = True,
    ) -> None:
        """Make the tables.

        Args:
            schema: tables and features.
            config: width and initialization of the rows.
            seed: seed of fresh tables; None for zeros, to be loaded.
            sparse: whether `weight` gets sparse gradients.
            held: False if the rows are stored elsewhere; `weight` then has no rows.
        """
        super().__init__()
        layout = Layout.from_config(config, schema)
        self.sparse = sparse
        self.rows = dict(schema.tables)
        self.embeddings = layout.embeddings

        self.first_row: dict[str, int] = {}
        total_rows = 0
        for name, rows in self.rows.items():
            self.first_row[name] = total_rows
            total_rows += rows * self.embeddings[name]
        self.weight = nn.Parameter(torch.zeros(total_rows if held else 0, config.dim))

        self._register_single(layout.single)
        self._register_bags(layout.bags, layout.bag_of_O)
        one_row_per_bag = len(self.bag_O) == len(schema.bags)
        reads_means = all(slot.position == POOLED for slot in layout.bags)
        self.whole_bags = one_row_per_bag and reads_means
        if seed is not None:
            self._initialize(seed, config.init_std)

    def _register_single(self, slots: tuple[Slot, ...]) -> None:
        """Register the column, scale and offset of each embedded row of a single-valued feature."""
        columns = range(len(slots))
        columns_S, scales_S, offsets_S = self._lookups(columns, slots)
        self._register("single_S", columns_S)
        self._register("single_scale_S", scales_S)
        self._register("single_offset_S", offsets_S)

    def _register_bags(self, slots: tuple[Slot, ...], bag_of_O: tuple[int, ...]) -> None:
        """Register the bag, scale, offset and position of each embedded row of a bag."""
        bags_O, scales_O, offsets_O = self._lookups(bag_of_O, slots)
        self._register("bag_O", bags_O)
        self._register("bag_scale_O", scales_O)
        self._register("bag_offset_O", offsets_O)

        positions: list[int] = []
        for slot in slots:
            positions += [slot.position] * slot.width
        self._register("position_O", positions)

    def _lookups(
        self,
        sources: Sequence[int],
        slots: tuple[Slot, ...],
    ) -> tuple[list[int], list[int], list[int]]:
        """How an id becomes a row of `weight`, for every embedded row.

        Args:
            sources: for each slot, the column or bag that its ids come from.

        Returns:
            The source of the ids, their scale and their offset: row = id * scale + offset.
        """
        row_sources: list[int] = []
        scales: list[int] = []
        offsets: list[int] = []
        for source, slot in zip(sources, slots, strict=True):
            for embedding in range(slot.width):
                row_sources.append(source)
                scales.append(slot.width)
                offsets.append(self.first_row[slot.table] + embedding)
        return row_sources, scales, offsets

    def _register(self, name: str, values: list[int]) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def _initialize(self, seed: int, std: float) -> None:
        fresh = {}
        for name, table in self.tables().items():
            rows, width = table.shape
            fresh[name] = initial_table(name, rows, width, seed, std=std)
        self.load_tables(fresh)

    def forward(self, batch: Batch) -> Tensor:
        """Embed a batch: embedded_BRE."""
        return self.embed(batch.sparse_BS, batch.bag_values_V, batch.bag_lengths_MB)

    def embed(
        self,
        sparse_BS: Tensor,
        bag_values_V: Tensor,
        bag_lengths_MB: Tensor,
    ) -> Tensor:
        """Embed the tensors of a `Batch`.

        Returns:
            embedded_BRE: a row for a single value, the mean row for a bag, zeros for absent values.
        """
        ids_BS, rows_V, lengths_OB = self.numbers(sparse_BS, bag_values_V, bag_lengths_MB)
        return self.pool(ids_BS, rows_V, lengths_OB, self.weight)

    def numbers(
        self,
        sparse_BS: Tensor,
        bag_values_V: Tensor,
        bag_lengths_MB: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute which rows of `weight` a batch reads.

        Returns:
            ids_BS of single values, rows_V of the bags' slots, and their lengths_OB.
        """
        ids_BS = sparse_BS[:, self.single_S] * self.single_scale_S + self.single_offset_S
        if not len(self.bag_offset_O):
            return ids_BS, bag_values_V, bag_lengths_MB

        values_V, lengths_OB = bag_values_V, bag_lengths_MB
        if not self.whole_bags:
            values_V, lengths_OB = expand_bags(values_V, lengths_OB, self.bag_O, self.position_O)
        slot_V = torch.repeat_interleave(lengths_OB.sum(dim=1), output_size=values_V.shape[0])
        rows_V = values_V * self.bag_scale_O[slot_V] + self.bag_offset_O[slot_V]
        return ids_BS, rows_V, lengths_OB

    def pool(
        self,
        ids_BS: Tensor,
        rows_V: Tensor,
        lengths_OB: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """Look up the result of `numbers` in `weight`: embedded_BRE."""
        single_BRE = F.embedding(ids_BS, weight, sparse=self.sparse)
        if not len(self.bag_offset_O):
            return single_BRE

        lengths_X = lengths_OB.flatten()
        starts_X = lengths_X.cumsum(0) - lengths_X
        means_XE = F.embedding_bag(rows_V, weight, starts_X, mode="mean", sparse=self.sparse)
        means_OBE = means_XE.view(*lengths_OB.shape, weight.shape[1])
        return torch.cat([single_BRE, means_OBE.transpose(0, 1)], dim=1)

    def tables(self) -> dict[str, Tensor]:
        """Views of the tables by name, (rows, embeddings times E), without gradient.

        Writing to a view writes to `weight`.
        """
        weight = self.weight.detach()
        dim = weight.shape[1]
        views = {}
        for name, first in self.first_row.items():
            rows = self.rows[name]
            embeddings = self.embeddings[name]
            table = weight[first : first + rows * embeddings]
            views[name] = table.view(rows, embeddings * dim)
        return views

    def load_tables(self, tables: Mapping[str, Tensor]) -> None:
        """Copy tables in by name.

        Raises:
            ValueError: a name or a shape does not fit; nothing has been copied then.
        """
        local = self.tables()
        for name, table in local.items():
            if name not in tables:
                names = ", ".join(tables) or "none"
                raise ValueError(f"table '{name}' is missing; given: {names}")
            if tables[name].shape != table.shape:
                raise ValueError(
                    f"table '{name}' has shape {tuple(tables[name].shape)}, "
                    f"the schema and dim say {tuple(table.shape)}"
                )
        for name in tables:
            if name not in local:
                names = ", ".join(local)
                raise ValueError(f"table '{name}' is not one of this schema's: {names}")

        for name, table in local.items():
            table.copy_(tables[name])
