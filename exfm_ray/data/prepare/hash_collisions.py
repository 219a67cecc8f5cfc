"""How often different ids share a row of a hashed table: counted while the raw values stream by, in
bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from exfm_ray.schema import Encoding, Schema

Array = np.ndarray[Any, Any]
Watch = Callable[[str, Array, Array, "Array | int"], None]
"""Told of hashed values: table, id_U uint64, row_U, and how many values each of the U entries
stands for."""

WATCHED_ROWS = 1 << 22
"""Rows of a table that are watched, at 17 bytes each."""


class Collisions:
    """Counts for each hashed table of a schema. An id is the 64-bit hash of a raw value, of which
    its row is the remainder.

    A table of more than `watched` rows is watched in rows 1 to `watched`, and its counts are scaled
    up. Any fixed rows are a fair sample of rows, for the hash is well mixed. They are a poor sample
    of values, where a few ids have many of them: so for such a table the values in shared rows are
    the expected ones. Whatever an id's popularity, the chance that another id has its row is the
    part of the rows that others use.
    """

    def __init__(self, schema: Schema, watched: int = WATCHED_ROWS) -> None:
        owners = [
            f
            for f in (*schema.single, *schema.bags)
            if f.table is None and f.encoding is Encoding.HASH
        ]
        self._tables = {f.name: _Table(f.rows, watched) for f in owners}

    def add(
        self,
        table: str,
        id_U: Array,
        row_U: Array,
        count_U: Array | int,
    ) -> None:
        """Take in values of `table` (see `Watch`); an id may come several times."""
        self._tables[table].add(id_U, row_U, count_U)

    def statistics(self) -> dict[str, dict[str, int]]:
        """For each table its `rows`, those `used` by any value, those `shared` by two or more ids;
        the `values` seen (missing ones left out) and the `values_in_shared_rows`."""
        return {name: table.statistics() for name, table in self._tables.items()}


class _Table:
    """The first id of each watched row R, whether another one came, and how many values the row
    stands for."""

    def __init__(self, rows: int, watched: int) -> None:
        self.rows = rows
        self.values = 0
        self.sampled = rows - 1 > watched
        size = 1 + min(rows - 1, watched)
        self._first_R = np.zeros(size, np.uint64)
        self._count_R = np.zeros(size, np.int64)
        self._shared_R = np.zeros(size, bool)

    def add(
        self,
        id_U: Array,
        row_U: Array,
        count_U: Array | int,
    ) -> None:
        self.values += len(id_U) * count_U if isinstance(count_U, int) else int(count_U.sum())
        if self.sampled:
            inside_U = row_U < len(self._first_R)
            id_U = id_U[inside_U]
            row_U = row_U[inside_U]
            count_U = count_U if isinstance(count_U, int) else count_U[inside_U]
        row_U = row_U.astype(np.intp)  # indexing would do it each time
        other_V = np.flatnonzero(self._first_R[row_U] != id_U)
        if len(other_V):
            self._differ(id_U[other_V], row_U[other_V])
        np.add.at(self._count_R, row_U, count_U)

    def _differ(self, id_V: Array, row_V: Array) -> None:
        """Take in ids that are not the first of their row, or are the first to come."""
        new_V = self._count_R[row_V] == 0
        self._first_R[row_V[new_V]] = id_V[
            new_V
        ]  # of several new ids of one row the last stays; the others differ from it below
        self._shared_R[row_V[self._first_R[row_V] != id_V]] = True

    def statistics(self) -> dict[str, int]:
        watched = len(self._count_R) - 1
        used = int(np.count_nonzero(self._count_R))
        shared = int(self._shared_R.sum())
        in_shared = int(self._count_R[self._shared_R].sum())
        if self.sampled:
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
