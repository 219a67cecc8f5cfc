"""Cuts the encoded events into windows and hands them to the writer, normalised by what came
before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from exfm_ray.config.data import WindowConfig
from exfm_ray.data.prepare.normalizer import Normalizer
from exfm_ray.data.prepare.packer import Rows
from exfm_ray.data.stream import StreamWriter, WindowWriter
from exfm_ray.errors import UserError

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int], None]
LARGEST_GAP = 20_000


class WindowCutter:
    """Windows by time count from the first event's window, empty ones between included where they
    are allowed; windows by rows hold `rows` events, windows by file as many as `file_rows` says."""

    def __init__(
        self,
        writer: StreamWriter,
        config: WindowConfig,
        source: str,
        progress: Progress | None,
        file_rows: Sequence[int] = (),
    ) -> None:
        self.normalizer = Normalizer([d.name for d in writer.schema.dense])
        self.rows = self.duplicates = self.windows = 0
        self._writer = writer
        self._config = config
        self._source = source
        self._progress = progress
        self._first: int | None = None
        self._file_ends = np.cumsum(file_rows)
        self._window: WindowWriter | None = None
        self._window_rows = self._window_duplicates = 0

    def add(self, rows: Rows, kept_N: Array) -> None:
        """Take in events in event order; those not in `kept_N` are only counted."""
        index_N = self._indices(rows.times_N, kept_N)
        borders = np.flatnonzero(np.diff(index_N)) + 1
        for begin, end in pairwise([0, *borders.tolist(), len(rows)]):
            if end > begin:
                piece = rows.take(slice(begin, end))
                self._enter(int(index_N[begin]), int(piece.times_N[0]))
                self._append(piece, kept_N[begin:end])

    def _indices(self, times_N: Array, kept_N: Array) -> Array:
        """Window of each event, counted from 0."""
        if self._config.by != "time":
            # A dropped repetition belongs to the window of the event before it.
            number_N = np.maximum(self.rows + np.cumsum(kept_N) - 1, 0)
            return np.asarray(
                number_N // self._config.rows
                if self._config.by == "rows"
                else np.searchsorted(self._file_ends, number_N, "right")
            )
        absolute_N = (times_N - self._config.offset_s * 1000) // (self._config.length_s * 1000)
        if self._first is None and len(times_N):
            self._first = int(absolute_N[0])
        return np.asarray(absolute_N - (self._first or 0))

    def _enter(self, index: int, time: int) -> None:
        gap = index - self._window.index - 1 if self._window else 0
        if gap > LARGEST_GAP or (gap > 0 and self._config.empty == "error"):
            raise UserError(
                f"{self._source}: {gap} empty windows before the event at {time} ms; is the unit of the event time right? Otherwise raise "
                f"data.window.length_s ({self._config.length_s}), or set data.window.empty=keep for up to {LARGEST_GAP} empty windows in a row"
            )
        while self._window is None or self._window.index < index:
            self._open(0 if self._window is None else self._close(self._window) + 1, time)

    def _open(self, index: int, time: int) -> None:
        start = time
        end = time + 1
        if self._config.by == "time":
            assert self._first is not None
            start = ((self._first + index) * self._config.length_s + self._config.offset_s) * 1000
            end = start + self._config.length_s * 1000
        self._window = self._writer.window(index, start, end)
        self._window_rows = self._window_duplicates = 0

    def _append(self, piece: Rows, kept_N: Array) -> None:
        window = self._window
        assert window
        self._window_duplicates += int(piece.repeated_N.sum())
        if self._config.by != "time":
            window.end_ms = int(piece.times_N[-1]) + 1
        if not kept_N.all():
            piece = piece.take(kept_N)
        if not window.committed:
            window.append(
                piece.packed(self._writer.schema, self.normalizer.apply(piece.dense_ND)),
                piece.known_NT,
            )
        self.normalizer.observe(piece.dense_ND)
        self._window_rows += len(piece)
        self.rows += len(piece)

    def _close(self, window: WindowWriter) -> int:
        """Commit the open window; its index."""
        window.commit(self._window_duplicates)
        self.normalizer.close_window()
        self.duplicates += self._window_duplicates
        self.windows += 1
        if self._progress:
            self._progress(window.index, self._window_rows)
        return window.index

    def finish(self) -> None:
        """Commit the last window. UserError where there was no event at all."""
        if self._window is None or not self.rows:
            raise UserError(
                f"{self._source}: no events in it; check data.root and the file's contents"
            )
        self._close(self._window)
        self._window = None

    def statistics(self) -> dict[str, Any]:
        """For the stream's manifest: totals, and the state by which serving normalises dense
        features."""
        return {"rows": self.rows, "duplicates": self.duplicates, "dense": self.normalizer.state()}
