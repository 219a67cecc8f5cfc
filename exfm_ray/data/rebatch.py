"""Regroups a stream of tables into tables of an exact number of rows, without copying rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa


class Rebatcher:
    """Takes tables of any size and returns tables of `rows` rows; `flush` returns the remainder."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._waiting: list[pa.Table] = []
        self._count = 0

    def add(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield the tables that `table` completes. An empty table may have missing columns."""
        if not table.num_rows:
            return
        self._waiting.append(table)
        self._count += table.num_rows
        if self._count < self._rows:
            return

        joined = pa.concat_tables(self._waiting)
        remainder = self._count % self._rows
        full = self._count - remainder
        self._waiting = [joined.slice(full)]
        self._count = remainder
        for start in range(0, full, self._rows):
            yield joined.slice(start, self._rows)

    def flush(self) -> Iterator[pa.Table]:
        """Yield one last, shorter table, or none when no row is left."""
        if self._count:
            yield pa.concat_tables(self._waiting)
        self._waiting = []
        self._count = 0


def regroup(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the same rows in tables of exactly `rows` rows; the last one may be shorter."""
    rebatcher = Rebatcher(rows)
    for table in tables:
        yield from rebatcher.add(table)
    yield from rebatcher.flush()
