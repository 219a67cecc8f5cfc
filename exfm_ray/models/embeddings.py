"""Embedding tables in plain torch: for one device, for export, and to read. The engine trains with TorchRec's tables.

Features are in the order F = (*schema.single, *schema.bags) everywhere. Shape suffixes as in `exfm_ray.data.batch`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exfm_ray.data.batch import Batch
from exfm_ray.schema import Schema, SparseFeature

INIT_STD = 0.05
"""Standard deviation of a fresh row. As large as one step of row-wise Adagrad at the default rate (its first step has a
root mean square of `table_lr` = 0.05 whatever the gradient), so one event suffices to tell an id from its random start;
and not so small that the layer norm after Wukong's FM, whose input is quadratic in it, sees nothing but its epsilon."""

BLOCK_ROWS = 65_536
"""Rows drawn from one generator. Part of the definition of the initial tables: another value gives other tables."""


def initial_table(name: str, rows: int, dim: int, seed: int, first_row: int = 0, last_row: int | None = None) -> Tensor:
    """Rows [first_row, last_row) of the fresh table `name`, float32 (last_row - first_row, dim).

    A row depends on (seed, name, rows, dim) only and not on the slice asked for, so each worker of a row-wise sharded table
    makes its own rows and all ways to shard start alike. Row 0, the missing value, is a row like any other.
    """
    last = rows if last_row is None else last_row
    if not 0 <= first_row <= last <= rows:
        raise ValueError(f"rows [{first_row}, {last}) of table '{name}', which has {rows} rows")
    table = torch.empty(last - first_row, dim)
    for start in range(first_row - first_row % BLOCK_ROWS, last, BLOCK_ROWS):
        block = _initial_block(name, start, min(BLOCK_ROWS, rows - start), dim, seed)
        low, high = max(first_row, start), min(last, start + len(block))
        table[low - first_row : high - first_row] = block[low - start : high - start]
    return table


def _initial_block(name: str, start: int, rows: int, dim: int, seed: int) -> Tensor:
    key = hashlib.sha256(f"{seed}/{name}/{start // BLOCK_ROWS}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return torch.empty(rows, dim).normal_(0.0, INIT_STD, generator=generator)


class PlainTables(nn.Module):
    """All tables stacked in one parameter; a feature's ids are moved by the offset of the table that it reads.

    So neither the single-valued features nor the bags need a loop: one gather for the former, one `embedding_bag` for
    the latter.

    Attributes:
        weight: float32 (sum of the tables' rows, E).
    """

    single_offset_S: Tensor
    bag_offset_M: Tensor

    def __init__(self, schema: Schema, dim: int, seed: int | None) -> None:
        """Fresh tables from `seed`; zeros, to be loaded, where it is None."""
        super().__init__()
        self.rows = dict(schema.tables)
        ends = list(accumulate(self.rows.values()))
        self.first_row = dict(zip(self.rows, [0, *ends], strict=False))
        self.weight = nn.Parameter(torch.zeros(ends[-1], dim))
        self.register_buffer("single_offset_S", self._offsets(schema.single), persistent=False)
        self.register_buffer("bag_offset_M", self._offsets(schema.bags), persistent=False)
        if seed is not None:
            self.load_tables({name: initial_table(name, rows, dim, seed) for name, rows in self.rows.items()})

    def _offsets(self, features: tuple[SparseFeature, ...]) -> Tensor:
        return torch.tensor([self.first_row[f.table or f.name] for f in features], dtype=torch.int64)

    def forward(self, batch: Batch) -> Tensor:
        """A batch to embedded_BFE."""
        return self.embed(batch.sparse_BS, batch.bag_values_V, batch.bag_lengths_MB)

    def embed(self, sparse_BS: Tensor, bag_values_V: Tensor, bag_lengths_MB: Tensor) -> Tensor:
        """The tensors of a `Batch` to embedded_BFE: a row for a single value, the mean row for a bag, zeros for an empty bag."""
        single_BSE = F.embedding(sparse_BS + self.single_offset_S, self.weight)
        if not len(self.bag_offset_M):
            return single_BSE
        return torch.cat([single_BSE, self._embed_bags(bag_values_V, bag_lengths_MB)], dim=1)

    def _embed_bags(self, values_V: Tensor, lengths_MB: Tensor) -> Tensor:
        offset_V = torch.repeat_interleave(self.bag_offset_M, lengths_MB.sum(dim=1), output_size=values_V.shape[0])
        ends_MB = lengths_MB.flatten().cumsum(0)
        bags = F.embedding_bag(values_V + offset_V, self.weight, ends_MB - lengths_MB.flatten(), mode="mean")
        return bags.view(*lengths_MB.shape, self.weight.shape[1]).transpose(0, 1)

    def tables(self) -> dict[str, Tensor]:
        """Views of the tables by name, without gradient: writing to one writes to `weight`."""
        weight = self.weight.detach()
        return {name: weight[first : first + self.rows[name]] for name, first in self.first_row.items()}

    def load_tables(self, tables: Mapping[str, Tensor]) -> None:
        """Copy tables in by name. ValueError, before anything is copied, for a name or a shape that does not fit."""
        own = self.tables()
        for name in [*own, *tables]:
            if name not in tables:
                raise ValueError(f"table '{name}' is missing; given: {', '.join(tables) or 'none'}")
            if name not in own:
                raise ValueError(f"table '{name}' is not one of this schema's: {', '.join(own)}")
            if tables[name].shape != own[name].shape:
                raise ValueError(f"table '{name}' has shape {tuple(tables[name].shape)}, the schema and dim say {tuple(own[name].shape)}")
        for name, table in own.items():
            table.copy_(tables[name])
