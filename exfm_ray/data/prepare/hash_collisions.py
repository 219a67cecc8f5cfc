"""How often different ids share a row of a hashed table, counted in bounded memory while the raw
values stream by.

Shapes: U entries (ids), V entries whose id differs from the first of its row, R counted rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from exfm_ray.schema import Encoding, Schema

Array = np.ndarray[Any, Any]
Watch = Callable[[str, Array, Array, "Array | int"], None]
"""Receives hashed values: table, id_U uint64, row_U, and the number of values of each entry."""

WATCHED_ROWS = 1 << 22
"""Rows of a table that are counted, at 17 bytes each."""


class Collisions:
    """Counts for each hashed table of a schema.

    An id is the 64-bit hash of a raw value; its row is the remainder. In a table of more than
    `watched` rows only rows 1 to `watched` are counted, and the counts are scaled up. Any fixed
    rows are a fair sample of rows, because the hash is well mixed. They are a poor sample of
    values, because a few ids have many of them. So for such a table the values in shared rows are
    the expected ones: whatever an id's popularity, the probability that another id has its row is
    the fraction of rows that are used.
    """

    def __init__(self, schema: Schema, watched: int = WATCHED_ROWS) -> None:
        self._tables = {}
        for feature in (*schema.single, *schema.bags):
            if feature.table is None and feature.encoding is Encoding.HASH:
                self._tables[feature.name] = _Table(feature.rows, watched)

    def add(
        self,
        table: str,
        id_U: Array,
        row_U: Array,
        count_U: Array | int,
    ) -> None:
        """Add values of `table` (see `Watch`). An id may come several times."""
        self._tables[table].add(id_U, row_U, count_U)

    def statistics(self) -> dict[str, dict[str, int]]:
        """Counts of each table.

        Returns:
            For each table its `rows`; the rows `used` by any value; the rows `shared` by two or
            more ids; the `values` seen, without missing ones; and the `values_in_shared_rows`.
        """
        statistics = {}
        for name, table in self._tables.items():
            statistics[name] = table.statistics()
        return statistics


class _Table:
    """The first id of each counted row R, whether another one came, and the number of values."""

    def __init__(self, rows: int, watched: int) -> None:
        size = 1 + min(rows - 1, watched)
        self.rows = rows
        self.values = 0
        self.sampled = rows - 1 > watched
        self._first_R = np.zeros(size, np.uint64)
        self._count_R = np.zeros(size, np.int64)
        self._shared_R = np.zeros(size, bool)

    def add(
        self,
        id_U: Array,
        row_U: Array,
        count_U: Array | int,
    ) -> None:
        if isinstance(count_U, int):
            self.values += len(id_U) * count_U
        else:
            self.values += int(count_U.sum())
        if self.sampled:
            inside_U = row_U < len(self._first_R)
            id_U = id_U[inside_U]
            row_U = row_U[inside_U]
            if not isinstance(count_U, int):
                count_U = count_U[inside_U]

        row_U = row_U.astype(np.intp)  # otherwise each indexing below would convert it
        differs_U = self._first_R[row_U] != id_U
        other_V = np.flatnonzero(differs_U)
        if len(other_V):
            self._add_other(id_U[other_V], row_U[other_V])
        np.add.at(self._count_R, row_U, count_U)

    def _add_other(self, id_V: Array, row_V: Array) -> None:
        """Add ids that are not the first of their row, or are the first to come."""
        new_V = self._count_R[row_V] == 0
        # Of several new ids of one row the last one stays; the others differ from it below.
        self._first_R[row_V[new_V]] = id_V[new_V]
        differs_V = self._first_R[row_V] != id_V
        self._shared_R[row_V[differs_V]] = True

    def statistics(self) -> dict[str, int]:
        used = int(np.count_nonzero(self._count_R))
        shared = int(self._shared_R.sum())
        in_shared = int(self._count_R[self._shared_R].sum())
        if self.sampled:
            watched = len(self._count_R) - 1
            scale = (self.rows - 1) / watched
            in_shared = round(self.values * used / watched)
            used = round(used * scale)
            shared = round(shared * scale)
        return {
            "rows": self.rows,
            "used": used,
            "shared": shared,
            "values": self.values,
            "values_in_shared_rows": in_shared,
        }
