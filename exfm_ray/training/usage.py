"""When each table row was last used, so that the rows of ids that have left can be reset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from exfm_ray.data.stream import list_values
from exfm_ray.schema import Schema

Array = np.ndarray[Any, Any]
NEVER = -1


class Usage:
    """The last window in which an example used a row, for the rows R of all tables, one table after the other.

    Only windows with examples count, from 0 on: a silence of the stream makes no row stale. Every worker marks the rows of
    whole fragments, not of its share, so all workers hold the same and need not ask each other.
    """

    def __init__(self, schema: Schema, windows: int) -> None:
        """`windows`: for how many windows a row may be unused."""
        self._schema, self._windows = schema, windows
        rows_T = np.array(list(schema.tables.values()), np.int64)
        self._first_T = np.cumsum(rows_T) - rows_T
        first = dict(zip(schema.tables, self._first_T, strict=True))
        self._single_S = np.array([first[f.table or f.name] for f in schema.single])
        self._bags = [(f.name, first[f.table or f.name]) for f in schema.bags]
        self._last_R = np.full(rows_T.sum(), NEVER, np.int32)
        self._window, self._marked = 0, False

    def mark(self, rows: pa.Table) -> None:
        """The window's examples `rows` use their table rows."""
        if not rows.num_rows:
            return
        self._last_R[list_values(rows["sparse"], len(self._single_S)) + self._single_S] = self._window
        for name, first in self._bags:
            values_V = rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            self._last_R[values_V + first] = self._window
        self._marked = True

    def end_window(self) -> dict[str, Array]:
        """The rows that none of the last `windows` windows used, by table, int64 ascending; from now on they count as never used.

        Row 0, the missing value, is never among them.
        """
        if not self._marked:
            return {}
        self._last_R[self._first_T] = NEVER
        stale_X = np.flatnonzero((self._last_R != NEVER) & (self._last_R <= self._window - self._windows))
        self._last_R[stale_X] = NEVER
        self._window, self._marked = self._window + 1, False
        parts = np.split(stale_X, np.searchsorted(stale_X, self._first_T[1:]))
        return {table: part - first for table, first, part in zip(self._schema.tables, self._first_T, parts, strict=True) if len(part)}

    def state(self) -> dict[str, Array]:
        """For a checkpoint: a copy."""
        return {"last": self._last_R.copy(), "window": np.array([self._window, self._marked], np.int64)}

    def restore(self, state: Mapping[str, Array]) -> None:
        """From `state()`."""
        self._last_R = np.array(state["last"], np.int32)
        self._window, self._marked = int(state["window"][0]), bool(state["window"][1])
