"""Embedding tables in plain torch: for one device, for export, and to read. The engine trains with
TorchRec's tables.

Rows are in the order of `exfm_ray.models.layout`. Shape suffixes as in `exfm_ray.data.batch`; O
slots of bags.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import accumulate
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
"""Standard deviation of a fresh row by default. As large as one step of row-wise Adagrad at the
default rate (its first step has a root mean square of `table_lr` = 0.05 whatever the gradient), so
one event suffices to tell an id from its random start."""

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

    A row depends on (seed, name, rows, dim, std) only and not on the slice asked for, so each
    worker of a row-wise sharded table makes its own rows and all ways to shard start alike. Row 0,
    the missing value, is a row like any other.
    """
    last = rows if last_row is None else last_row
    if not 0 <= first_row <= last <= rows:
        raise ValueError(f"rows [{first_row}, {last}) of table '{name}', which has {rows} rows")
    table = torch.empty(last - first_row, dim)
    for start in range(first_row - first_row % BLOCK_ROWS, last, BLOCK_ROWS):
        block = _initial_block(name, start, min(BLOCK_ROWS, rows - start), dim, seed, std)
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
    """Some rows of `initial_table`, by their numbers, int64 in ascending order: float32 (X,
    dim)."""
    numbers, begins = np.unique(row_X // BLOCK_ROWS, return_index=True)
    found = [torch.empty(0, dim)]
    for start, own_X in zip(
        (numbers * BLOCK_ROWS).tolist(), np.split(row_X, begins[1:]), strict=False
    ):  # no rows: one empty part
        block = _initial_block(name, start, min(BLOCK_ROWS, rows - start), dim, seed, std)
        found.append(block[torch.from_numpy(own_X - start)])
    return torch.cat(found)


def _initial_block(
    name: str,
    start: int,
    rows: int,
    dim: int,
    seed: int,
    std: float,
) -> Tensor:
    key = hashlib.sha256(f"{seed}/{name}/{start // BLOCK_ROWS}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return torch.empty(rows, dim).normal_(0.0, std, generator=generator)


class LocalTables(nn.Module):
    """All tables stacked in one parameter; a slot's ids are moved by the offset of the table that
    it reads.

    So neither the single-valued features nor the bags need a loop: one gather for the former, one
    `embedding_bag` for the latter. A table with several embeddings for an id holds them in
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
        """Fresh tables from `seed`; zeros, to be loaded, where it is None. `sparse`: `weight` gets
        sparse gradients. Not `held`: the rows lie elsewhere, and `weight` has none."""
        super().__init__()
        layout = Layout.from_config(config, schema)
        self.sparse = sparse
        self.rows = dict(schema.tables)
        self.embeddings = layout.embeddings
        ends = list(accumulate(rows * self.embeddings[name] for name, rows in self.rows.items()))
        self.first_row = dict(zip(self.rows, [0, *ends], strict=False))
        self.weight = nn.Parameter(torch.zeros(ends[-1] if held else 0, config.dim))
        self._numbers("single", layout.single, tuple(range(len(layout.single))))
        self._numbers("bag", layout.bags, layout.bag_of_O)
        positions = [slot.position for slot in layout.bags for _ in range(slot.width)]
        self.register_buffer(
            "position_O", torch.tensor(positions, dtype=torch.int64), persistent=False
        )
        self.whole_bags = len(self.bag_O) == len(schema.bags) and all(
            position == POOLED for position in positions
        )
        if seed is not None:
            fresh = {
                name: initial_table(name, table.shape[0], table.shape[1], seed, std=config.init_std)
                for name, table in self.tables().items()
            }
            self.load_tables(fresh)

    def _numbers(
        self,
        kind: str,
        slots: tuple[Slot, ...],
        source: tuple[int, ...],
    ) -> None:
        """For every embedded row: from which column its ids come, and how an id becomes a row of
        `weight`."""
        each = [
            (column, slot, embedding)
            for column, slot in zip(source, slots, strict=True)
            for embedding in range(slot.width)
        ]
        suffix = "S" if kind == "single" else "O"
        numbers = {
            f"{kind}_{suffix}": [column for column, _, _ in each],
            f"{kind}_scale_{suffix}": [slot.width for _, slot, _ in each],
            f"{kind}_offset_{suffix}": [
                self.first_row[slot.table] + embedding for _, slot, embedding in each
            ],
        }
        for name, values in numbers.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """A batch to embedded_BRE."""
        return self.embed(batch.sparse_BS, batch.bag_values_V, batch.bag_lengths_MB)

    def embed(
        self,
        sparse_BS: Tensor,
        bag_values_V: Tensor,
        bag_lengths_MB: Tensor,
    ) -> Tensor:
        """The tensors of a `Batch` to embedded_BRE: a row for a single value, the mean row for a
        bag, zeros for what is absent."""
        return self.pool(*self.numbers(sparse_BS, bag_values_V, bag_lengths_MB), self.weight)

    def numbers(
        self,
        sparse_BS: Tensor,
        bag_values_V: Tensor,
        bag_lengths_MB: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which rows of `weight` a batch reads: ids_BS of single values, rows_V of the bags' slots
        with their lengths_OB."""
        ids_BS = sparse_BS[:, self.single_S] * self.single_scale_S + self.single_offset_S
        if not len(self.bag_offset_O):
            return ids_BS, bag_values_V, bag_lengths_MB
        if not self.whole_bags:
            bag_values_V, bag_lengths_MB = expand_bags(
                bag_values_V, bag_lengths_MB, self.bag_O, self.position_O
            )
        slot_V = torch.repeat_interleave(
            bag_lengths_MB.sum(dim=1), output_size=bag_values_V.shape[0]
        )
        return (
            ids_BS,
            bag_values_V * self.bag_scale_O[slot_V] + self.bag_offset_O[slot_V],
            bag_lengths_MB,
        )

    def pool(
        self,
        ids_BS: Tensor,
        rows_V: Tensor,
        lengths_OB: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """What `numbers` gives, looked up in `weight`: embedded_BRE."""
        single_BRE = F.embedding(ids_BS, weight, sparse=self.sparse)
        if not len(self.bag_offset_O):
            return single_BRE
        ends_X = lengths_OB.flatten().cumsum(0)
        bags = F.embedding_bag(
            rows_V, weight, ends_X - lengths_OB.flatten(), mode="mean", sparse=self.sparse
        )
        return torch.cat(
            [single_BRE, bags.view(*lengths_OB.shape, weight.shape[1]).transpose(0, 1)], dim=1
        )

    def tables(self) -> dict[str, Tensor]:
        """Views of the tables by name, (rows, embeddings times E), without gradient: writing to one
        writes to `weight`."""
        weight = self.weight.detach()
        dim = self.weight.shape[1]
        found = {}
        for name, first in self.first_row.items():
            rows = self.rows[name]
            embeddings = self.embeddings[name]
            found[name] = weight[first : first + rows * embeddings].view(rows, embeddings * dim)
        return found

    def load_tables(self, tables: Mapping[str, Tensor]) -> None:
        """Copy tables in by name. ValueError, before anything is copied, for a name or a shape that
        does not fit."""
        own = self.tables()
        for name in [*own, *tables]:
            if name not in tables:
                raise ValueError(f"table '{name}' is missing; given: {', '.join(tables) or 'none'}")
            if name not in own:
                raise ValueError(f"table '{name}' is not one of this schema's: {', '.join(own)}")
            if tables[name].shape != own[name].shape:
                raise ValueError(
                    f"table '{name}' has shape {tuple(tables[name].shape)}, the schema and dim say {tuple(own[name].shape)}"
                )
        for name, table in own.items():
            table.copy_(tables[name])
