"""Which worker holds which embedding table, or which rows of it.

The engine places the tables with `place_tables`, and a memory plan counts them with `table_shards`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from exfm_ray.config.trainer import FMConfig
from exfm_ray.models.layout import Layout
from exfm_ray.schema import Schema

FLOAT_BYTES = 4

Ints = np.ndarray[Any, np.dtype[np.int64]]


def place_tables(
    tables: Mapping[str, int],
    sharding: Literal["row_wise", "table_wise"],
    workers: int,
) -> dict[str, int | None]:
    """Assign tables to workers.

    Row-wise, every table is split over all workers. A single worker holds whole tables instead,
    which costs it a third of the time. Table-wise, the tables are assigned in descending size
    (ties by name), each to the worker with the fewest rows so far, the first of several.

    Args:
        tables: name -> rows.
        sharding: "row_wise" or "table_wise".
        workers: number of workers.

    Returns:
        The worker that holds each table whole, None if it is split; largest table first.
    """
    assigned_rows = [0] * workers
    placement: dict[str, int | None] = {}
    by_size = sorted(tables.items(), key=lambda item: (-item[1], item[0]))
    for table, rows in by_size:
        if sharding == "row_wise" and workers > 1:
            placement[table] = None
            continue
        fewest = min(assigned_rows)
        worker = assigned_rows.index(fewest)
        assigned_rows[worker] += rows
        placement[table] = worker
    return placement


@dataclass(frozen=True)
class TableShards:
    """One table over the workers.

    Attributes:
        name: of the table.
        rows: of the whole table.
        width: float32 numbers per row.
        sharding: "row_wise" if the table is split, else "table_wise".
        rows_W: rows on each worker.
    """

    name: str
    rows: int
    width: int
    sharding: str
    rows_W: Ints

    @property
    def row_bytes(self) -> int:
        """Bytes of one row with its row-wise Adagrad state, one number per row."""
        numbers = self.width + 1
        return FLOAT_BYTES * numbers

    @property
    def largest_bytes(self) -> int:
        """Bytes on the worker with the most rows, with the Adagrad state."""
        largest_rows = int(self.rows_W.max())
        return largest_rows * self.row_bytes


def table_shards(
    schema: Schema,
    layout: Layout,
    fm: FMConfig,
) -> tuple[TableShards, ...]:
    """Return how the tables are split over the workers, the largest table first.

    Row-wise, TorchRec gives every worker ceil(rows / workers) rows as long as any are left.
    """
    worker_W = np.arange(fm.workers, dtype=np.int64)
    shards = []
    for name, worker in place_tables(schema.tables, fm.sharding, fm.workers).items():
        rows = schema.tables[name]
        width = layout.embeddings[name] * fm.model.dim
        if worker is None:
            sharding = "row_wise"
            block = -(-rows // fm.workers)
            rows_W = np.clip(rows - block * worker_W, 0, block)
        else:
            sharding = "table_wise"
            rows_W = rows * (worker_W == worker)
        shard = TableShards(name, rows, width, sharding, rows_W)
        shards.append(shard)
    return tuple(shards)
