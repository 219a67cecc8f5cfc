"""Cuts the encoded events into windows and passes them to the writer, normalized with the
statistics of earlier windows."""

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
    """Assigns events to windows and writes these one by one.

    Windows by time count from the first event's window, with the empty ones between if these are
    allowed. Windows by rows hold `rows` events, windows by file as many as `file_rows` says.
    """

    def __init__(
        self,
        writer: StreamWriter,
        config: WindowConfig,
        source: str,
        progress: Progress | None,
        file_rows: Sequence[int] = (),
    ) -> None:
        """Start before the first event.

        Args:
            writer: writes the windows.
            config: how windows are cut.
            source: names the data in an error.
            progress: called with (window, rows) when a window is done.
            file_rows: number of events in each file, for windows by file.
        """
        self.normalizer = Normalizer([feature.name for feature in writer.schema.dense])
        self.rows = 0
        self.duplicates = 0
        self.windows = 0
        self._writer = writer
        self._config = config
        self._length_ms = config.length_s * 1000
        self._offset_ms = config.offset_s * 1000
        self._source = source
        self._progress = progress
        self._first: int | None = None
        self._file_ends = np.cumsum(file_rows)
        self._window: WindowWriter | None = None
        self._window_rows = 0
        self._window_duplicates = 0

    def add(self, rows: Rows, kept_N: Array) -> None:
        """Add events in event order. Those that are not in `kept_N` are only counted."""
        index_N = self._indices(rows.times_N, kept_N)
        borders = np.flatnonzero(np.diff(index_N)) + 1
        bounds = [0, *borders.tolist(), len(rows)]
        for begin, end in pairwise(bounds):
            if end == begin:
                continue
            piece = rows.take(slice(begin, end))
            index = int(index_N[begin])
            window = self._enter(index, int(piece.times_N[0]))
            self._append(window, piece, kept_N[begin:end])

    def _indices(self, times_N: Array, kept_N: Array) -> Array:
        """Window of each event, counted from 0."""
        if self._config.by == "time":
            since_offset_N = times_N - self._offset_ms
            absolute_N = since_offset_N // self._length_ms
            if self._first is None and len(times_N):
                self._first = int(absolute_N[0])
            return np.asarray(absolute_N - (self._first or 0))

        # A dropped repetition belongs to the window of the event before it.
        before_N = np.cumsum(kept_N) - 1
        number_N = np.maximum(self.rows + before_N, 0)
        if self._config.by == "rows":
            return np.asarray(number_N // self._config.rows)
        return np.asarray(np.searchsorted(self._file_ends, number_N, "right"))

    def _enter(self, index: int, time_ms: int) -> WindowWriter:
        """Open window `index` and all windows before it, unless it is open already."""
        if self._window is None:
            window = self._open(0, time_ms)
        else:
            window = self._window
            self._check_gap(index - window.index - 1, time_ms)
        while window.index < index:
            self._close(window)
            window = self._open(window.index + 1, time_ms)
        return window

    def _check_gap(self, gap: int, time_ms: int) -> None:
        if gap <= 0:
            return
        if gap <= LARGEST_GAP and self._config.empty == "keep":
            return
        raise UserError(
            f"{self._source}: {gap} empty windows before the event at {time_ms} ms; is the unit "
            "of the event time right? Otherwise raise data.window.length_s "
            f"({self._config.length_s}), or set data.window.empty=keep for up to {LARGEST_GAP} "
            "empty windows in a row"
        )

    def _open(self, index: int, time_ms: int) -> WindowWriter:
        start_ms = time_ms
        end_ms = time_ms + 1
        if self._config.by == "time":
            assert self._first is not None
            number = self._first + index
            start_ms = number * self._length_ms + self._offset_ms
            end_ms = start_ms + self._length_ms
        window = self._writer.window(index, start_ms, end_ms)
        self._window = window
        self._window_rows = 0
        self._window_duplicates = 0
        return window

    def _append(
        self,
        window: WindowWriter,
        piece: Rows,
        kept_N: Array,
    ) -> None:
        self._window_duplicates += int(piece.repeated_N.sum())
        if self._config.by != "time":
            last_ms = int(piece.times_N[-1])
            window.end_ms = last_ms + 1
        if not kept_N.all():
            piece = piece.take(kept_N)
        if not window.committed:
            dense_ND = self.normalizer.apply(piece.dense_ND)
            packed = piece.packed(self._writer.schema, dense_ND)
            window.append(packed, piece.known_NT)
        self.normalizer.observe(piece.dense_ND)
        self._window_rows += len(piece)
        self.rows += len(piece)

    def _close(self, window: WindowWriter) -> None:
        """Commit the open window."""
        window.commit(self._window_duplicates)
        self.normalizer.close_window()
        self.duplicates += self._window_duplicates
        self.windows += 1
        if self._progress:
            self._progress(window.index, self._window_rows)

    def finish(self) -> None:
        """Commit the last window. Raises UserError if there was no event at all."""
        if self._window is None or not self.rows:
            raise UserError(
                f"{self._source}: no events in it; check data.root and the file's contents"
            )
        self._close(self._window)
        self._window = None

    def statistics(self) -> dict[str, Any]:
        """Totals for the stream's manifest, and the state by which serving normalizes dense
        features."""
        dense = self.normalizer.state()
        return {
            "rows": self.rows,
            "duplicates": self.duplicates,
            "dense": dense,
        }
