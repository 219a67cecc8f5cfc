"""How often, and when last, each table row was used.

Rows of ids that have left the stream can so be reset. All workers see whole fragments, not only
their slice of a batch, so all hold the same numbers and need not communicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from exfm_ray.data.stream import list_values
from exfm_ray.schema import Schema, SparseFeature

Array = np.ndarray[Any, Any]
NEVER = -1


class _AllRows:
    """The rows R of all tables T, one table after the other."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        rows_T = np.array(list(schema.tables.values()), np.int64)
        self._first_T = np.cumsum(rows_T) - rows_T
        self._rows = int(rows_T.sum())

        first_rows = self._first_T.tolist()
        self._first: dict[str, int] = dict(zip(schema.tables, first_rows, strict=True))
        single = [self._first_row_of(feature) for feature in schema.single]
        self._single_S = np.array(single)
        self._bags = [(bag.name, self._first_row_of(bag)) for bag in schema.bags]

    def _first_row_of(self, feature: SparseFeature) -> int:
        """Number of the first row of the table that a feature reads."""
        table = feature.table or feature.name
        return self._first[table]

    def read_by(self, rows: pa.Table) -> Iterator[Array]:
        """Numbers of the table rows that examples read; each as often as it is read."""
        sparse_NS = list_values(rows["sparse"], len(self._single_S))
        yield sparse_NS + self._single_S
        for name, first in self._bags:
            values = rows[name].combine_chunks().flatten()
            value_V = values.to_numpy(zero_copy_only=False)
            yield value_V + first


class RowUseCounts(_AllRows):
    """How often examples of finished windows have read each table row."""

    def __init__(self, schema: Schema) -> None:
        """Start with zero uses."""
        super().__init__(schema)
        self._count_R = np.zeros(self._rows, np.int32)
        self._window_count_R = np.zeros(self._rows, np.int32)

    def mark(self, rows: pa.Table) -> None:
        """Note that examples use their table rows."""
        if not rows.num_rows:
            return
        for number_X in self.read_by(rows):
            np.add.at(self._window_count_R, number_X.ravel(), 1)

    def end_window(self) -> None:
        """Add the uses of the window to the counts.

        Within a window they do not count, so a job that resumes there can mark it again as a whole.
        """
        self._count_R += self._window_count_R
        self._window_count_R[:] = 0

    def of(self, table: str) -> Array:
        """Uses of a table's rows in all finished windows."""
        first = self._first[table]
        return self._count_R[first : first + self._schema.tables[table]]

    def state(self) -> dict[str, Array]:
        """A copy of the counts for a checkpoint."""
        return {"count": self._count_R.copy()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Restore what `state()` returned."""
        self._count_R = np.array(state["count"], np.int32)


class RowLastUse(_AllRows):
    """The last window in which an example used each table row.

    Only windows with examples count, from 0 on, so a silence of the stream makes no row stale.
    """

    def __init__(self, schema: Schema, windows: int) -> None:
        """A row is stale after `windows` windows without use."""
        super().__init__(schema)
        self._windows = windows
        self._last_R = np.full(self._rows, NEVER, np.int32)
        self._window = 0
        self._marked = False

    def mark(self, rows: pa.Table) -> None:
        """Note that examples of the window use their table rows."""
        if not rows.num_rows:
            return
        for number_X in self.read_by(rows):
            self._last_R[number_X] = self._window
        self._marked = True

    def end_window(self) -> dict[str, Array]:
        """Finish the window; return its stale rows, which then count as never used.

        Returns:
            Row numbers by table, int64 ascending. Row 0, the missing value, is never stale.
        """
        if not self._marked:
            return {}
        self._last_R[self._first_T] = NEVER
        is_used_R = self._last_R != NEVER
        is_old_R = self._last_R <= self._window - self._windows
        stale_X = np.flatnonzero(is_used_R & is_old_R)
        self._last_R[stale_X] = NEVER
        self._window += 1
        self._marked = False

        bounds = np.searchsorted(stale_X, self._first_T[1:])
        parts = np.split(stale_X, bounds)
        return {
            table: part - first
            for table, first, part in zip(self._schema.tables, self._first_T, parts, strict=True)
            if len(part)
        }

    def state(self) -> dict[str, Array]:
        """A copy of the state for a checkpoint."""
        return {
            "last": self._last_R.copy(),
            "window": np.array([self._window, self._marked], np.int64),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Restore what `state()` returned."""
        window, marked = state["window"]
        self._last_R = np.array(state["last"], np.int32)
        self._window = int(window)
        self._marked = bool(marked)
