"""Regroups a stream of tables into tables of an exact number of rows, without copying rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa


class Rebatcher:
    """Push tables in, take tables of `rows` rows out; `rest` gives what is left."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._waiting: list[pa.Table] = []
        self._count = 0

    def add(self, table: pa.Table) -> Iterator[pa.Table]:
        """The tables that are full with `table`'s rows; one without rows may lack columns."""
        if not table.num_rows:
            return
        self._waiting.append(table)
        self._count += table.num_rows
        if self._count < self._rows:
            return
        joined = pa.concat_tables(self._waiting)
        full = self._count - self._count % self._rows
        self._waiting = [joined.slice(full)]
        self._count = self._count - full
        for start in range(0, full, self._rows):
            yield joined.slice(start, self._rows)

    def flush(self) -> Iterator[pa.Table]:
        """One last, shorter table; none when no row is left."""
        if self._count:
            yield pa.concat_tables(self._waiting)
        self._waiting = []
        self._count = 0


def regroup(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `rows` rows, the last one shorter."""
    pieces = Rebatcher(rows)
    for table in tables:
        yield from pieces.add(table)
    yield from pieces.flush()
