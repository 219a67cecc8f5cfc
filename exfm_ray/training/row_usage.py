"""When each table row was last used, so that the rows of ids that have left can be reset; and how
often."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from exfm_ray.data.stream import list_values
from exfm_ray.schema import Schema

Array = np.ndarray[Any, Any]
NEVER = -1


class _AllRows:
    """The rows R of all tables, one table after the other."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        rows_T = np.array(list(schema.tables.values()), np.int64)
        self._first_T = np.cumsum(rows_T) - rows_T
        self._rows = int(rows_T.sum())
        self._first = dict(zip(schema.tables, self._first_T.tolist(), strict=True))
        self._single_S = np.array([self._first[f.table or f.name] for f in schema.single])
        self._bags = [(f.name, self._first[f.table or f.name]) for f in schema.bags]

    def read_by(self, rows: pa.Table) -> Iterator[Array]:
        """Numbers of the rows that examples read, as often as they do."""
        yield list_values(rows["sparse"], len(self._single_S)) + self._single_S
        for name, first in self._bags:
            yield rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) + first


class RowUseCounts(_AllRows):
    """How often examples of finished windows have read each row. All workers hold the same, as with
    `RowLastUse`."""

    def __init__(self, schema: Schema) -> None:
        super().__init__(schema)
        self._count_R, self._now_R = np.zeros(self._rows, np.int32), np.zeros(self._rows, np.int32)

    def mark(self, rows: pa.Table) -> None:
        """Examples `rows` use their table rows."""
        if rows.num_rows:
            for number_X in self.read_by(rows):
                np.add.at(self._now_R, number_X.ravel(), 1)

    def end_window(self) -> None:
        """A window is learnt: its uses count from now on. Within a window nothing does, so that
        going on there marks it whole again."""
        self._count_R += self._now_R
        self._now_R[:] = 0

    def of(self, table: str) -> Array:
        """Uses of a table's rows so far."""
        return self._count_R[self._first[table] :][: self._schema.tables[table]]

    def state(self) -> dict[str, Array]:
        """For a checkpoint: a copy."""
        return {"count": self._count_R.copy()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """From `state()`."""
        self._count_R = np.array(state["count"], np.int32)


class RowLastUse(_AllRows):
    """The last window in which an example used a row.

    Only windows with examples count, from 0 on: a silence of the stream makes no row stale. Every
    worker marks the rows of whole fragments, not of its share, so all workers hold the same and
    need not ask each other.
    """

    def __init__(self, schema: Schema, windows: int) -> None:
        """`windows`: for how many windows a row may be unused."""
        super().__init__(schema)
        self._windows = windows
        self._last_R = np.full(self._rows, NEVER, np.int32)
        self._window = 0
        self._marked = False

    def mark(self, rows: pa.Table) -> None:
        """The window's examples `rows` use their table rows."""
        if not rows.num_rows:
            return
        for number_X in self.read_by(rows):
            self._last_R[number_X] = self._window
        self._marked = True

    def end_window(self) -> dict[str, Array]:
        """The rows that none of the last `windows` windows used, by table, int64 ascending; from
        now on they count as never used.

        Row 0, the missing value, is never among them.
        """
        if not self._marked:
            return {}
        self._last_R[self._first_T] = NEVER
        stale_X = np.flatnonzero(
            (self._last_R != NEVER) & (self._last_R <= self._window - self._windows)
        )
        self._last_R[stale_X] = NEVER
        self._window = self._window + 1
        self._marked = False
        parts = np.split(stale_X, np.searchsorted(stale_X, self._first_T[1:]))
        return {
            table: part - first
            for table, first, part in zip(self._schema.tables, self._first_T, parts, strict=True)
            if len(part)
        }

    def state(self) -> dict[str, Array]:
        """For a checkpoint: a copy."""
        return {
            "last": self._last_R.copy(),
            "window": np.array([self._window, self._marked], np.int64),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """From `state()`."""
        self._last_R = np.array(state["last"], np.int32)
        self._window = int(state["window"][0])
        self._marked = bool(state["window"][1])
