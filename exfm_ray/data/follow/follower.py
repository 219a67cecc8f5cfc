"""Follows a stream without an end: events in any order become windows, labels in any order become
releases.

A window is cut when the watermark, the newest event time so far less `data.follow.lateness_s`, has
passed its end. An event whose window was cut before it came is counted and dropped. The follower's
state is stored with each window, so that a killed follower resumes with the same result:

    <stream>/window=003/follow.json
        position in the source, newest event time, watermark, late events, normalizer
    <stream>/window=003/pending.parquet
        raw events that came by then and belong to later windows
    <stream>/labels/part=000003.parquet
        labels that came together, with the position behind them
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exfm_ray.config.root import Config
from exfm_ray.data.follow.folder import Arrival, Arrivals, Position, metadata_value
from exfm_ray.data.labels.label_log import LabelLog, part_path, write_part
from exfm_ray.data.labels.releases import ATTRIBUTION
from exfm_ray.data.prepare.normalizer import Normalizer
from exfm_ray.data.prepare.packer import Packer, Rows
from exfm_ray.data.sources.base import RawSource
from exfm_ray.data.stream import EventStream, StreamWriter, WindowWriter, window_name
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import atomic_path, parquet_source, read_json, write_json
from exfm_ray.storage.remote import AnyPath

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int], None]
STATE = "follow.json"
PENDING = "pending.parquet"
FIRST = -(2**62)
"""Before all times."""
POSITION = "position"


class _Events(NamedTuple):
    """Events that wait for their window: raw, as `PENDING` stores them, and encoded."""

    raw: pa.Table
    encoded: Rows


class Follower:
    """Takes arrivals one by one.

    Whenever a window or a part of the label log is committed, all of the state is on disk.
    """

    def __init__(
        self,
        config: Config,
        writer: StreamWriter,
        arrivals: Arrivals,
        source: RawSource,
        progress: Progress | None = None,
    ) -> None:
        """Resume from what is on disk.

        Args:
            config: the run.
            writer: writes the windows.
            arrivals: where the events and labels come from.
            source: what the events are.
            progress: called with (window, rows) when a window is committed.
        """
        assert config.data.follow
        data = config.data
        self._data = data
        self._lateness_ms = config.data.follow.lateness_s * 1000
        self._poll_s = config.data.follow.poll_s
        self._writer = writer
        self._arrivals = arrivals
        self._source = source
        self._progress = progress
        self._length_ms = data.window.length_s * 1000
        self._offset_ms = data.window.offset_s * 1000
        self._stream = EventStream(writer.root, writer.schema)
        self._normalizer = Normalizer([feature.name for feature in writer.schema.dense])

        self._pending: list[_Events] = []
        self._position: Position = {}
        self._label_position: Position = {}
        self._newest_ms: int | None = None
        self._watermark = FIRST
        self._late = 0
        self._first = 0  # number of the stream's first window, counted from the epoch
        self._next = 0  # index of the next window
        self._label_log: LabelLog | None = None
        if data.delayed:
            stored = {"attribution_s": data.delayed, "late_labels": data.late_labels}
            write_json(writer.root / ATTRIBUTION, stored)
            correct = data.late_labels == "correct"
            self._label_log = LabelLog(self._stream, data.delayed, correct)
        self._recover()

    def _recover(self) -> None:
        self._recover_labels()
        windows = self._stream.windows()
        self._next = len(windows)
        if not windows:
            return
        folder = self._writer.root / window_name(windows[-1])
        state = read_json(folder / STATE)
        self._position = state["position"]
        self._newest_ms = state["newest_ms"]
        self._late = state["late_events"]
        self._watermark = state["watermark_ms"]
        self._normalizer.restore(state["normaliser"])
        first_window = self._stream.window(0)
        self._first = int(self._window_number(first_window.start_ms))

        source = parquet_source(folder / PENDING)
        pending = pq.read_table(source, partitioning=None)
        if pending.num_rows:
            self._add(pending, Path(PENDING))

    def _recover_labels(self) -> None:
        if self._label_log is None:
            return
        self._label_log.recover()
        if not self._label_log.parts:
            return
        last_part = self._label_log.parts - 1
        path = part_path(self._writer.root, last_part)
        last = pq.read_schema(parquet_source(path))
        position = metadata_value(last.metadata, POSITION)
        self._label_position = json.loads(position or "{}")

    def poll(self) -> bool:
        """Take everything that has come; True when the stream has ended and is complete."""
        ended = self._arrivals.ended()  # checked first: what came before the end is taken below
        while True:
            self._take_labels()
            arrival = self._arrivals.events(self._position)
            if arrival is None:
                break
            self._take_events(arrival)
        if ended:
            self._finish()
        return ended

    def run(self) -> None:
        """Poll until the stream has ended."""
        ended = self.poll()
        while not ended:
            time.sleep(self._poll_s)
            ended = self.poll()

    def _take_labels(self) -> None:
        label_log = self._label_log
        if label_log is None:
            return
        while True:
            arrival = self._arrivals.labels(self._label_position)
            if arrival is None:
                return
            facts = {POSITION: json.dumps(arrival.position)}
            write_part(self._writer.root, label_log.parts, arrival.rows, facts)
            label_log.add_part()
            self._label_position = arrival.position

    def _take_events(self, arrival: Arrival) -> None:
        if arrival.rows.num_rows:
            times_N = _times(arrival)
            late_N = self._late_events(times_N, arrival.held_ms)
            self._late += int(late_N.sum())
            on_time = arrival.rows.filter(pa.array(~late_N))
            if on_time.num_rows:
                self._add(on_time, arrival.file)
        self._position = arrival.position
        if self._newest_ms is None:
            return

        newest_ms = self._newest_ms
        if arrival.held_ms is not None:
            newest_ms = min(newest_ms, arrival.held_ms)
        self._watermark = max(self._watermark, newest_ms - self._lateness_ms)
        end = self._window_number(self._watermark)
        self._cut(int(end))
        if self._label_log:
            self._label_log.release(self._watermark)

    def _late_events(self, times_N: Array, held_ms: int | None) -> Array:
        """Which events belong to windows that are cut: bool (N,). Notes the newest time.

        With one queue, only the events before each event decide, so the number of pieces in which
        they came does not matter. With queues read side by side, earlier arrivals decide.
        """
        newest_N = np.maximum.accumulate(times_N)
        if held_ms is None:
            before_N = np.concatenate([[times_N[0]], newest_N[:-1]])
            watermark_N = np.maximum(before_N - self._lateness_ms, self._watermark)
        else:
            watermark_N = np.full(len(times_N), self._watermark)

        newest_ms = int(newest_N[-1])
        if self._newest_ms is not None:
            newest_ms = max(newest_ms, self._newest_ms)
        self._newest_ms = newest_ms
        window_N = self._window_number(times_N)
        first_open_N = self._window_number(watermark_N)
        return np.asarray(window_N < first_open_N)

    def _add(self, raw: pa.Table, file: Path) -> None:
        """Encode events and let them wait for their windows."""
        in_order = _in_order(raw)
        source = replace(self._source, files=(file,))
        packer = Packer(source, drop_duplicates=False)
        encoded = packer.encode(in_order)
        events = _Events(in_order, encoded)
        self._pending.append(events)

    def _window_number(self, times_ms: Any) -> Any:
        """Number of the window that holds each time, counted from the epoch."""
        length_ms = self._length_ms
        since_offset = times_ms - self._offset_ms
        return since_offset // length_ms

    def _cut(self, end: int | None) -> None:
        """Commit the windows before number `end`, or all that have events if `end` is None."""
        while self._pending:
            earliest = self._earliest_pending()
            if end is not None and earliest >= end:
                return
            if not self._next:
                self._first = earliest
            gap = earliest - self._first - self._next
            if gap and self._data.window.empty == "error":
                time_ms = self._pending[0].encoded.times_N[0]
                raise UserError(
                    f"{time_ms} ms: {gap} empty windows before the event at that time; is the "
                    "unit of the event time right? Otherwise raise data.window.length_s "
                    f"({self._data.window.length_s}), or set data.window.empty=keep"
                )
            for _ in range(gap + 1):
                self._commit()

    def _earliest_pending(self) -> int:
        """Number of the earliest window that has waiting events."""
        first_times = [int(events.encoded.times_N[0]) for events in self._pending]
        numbers = [int(self._window_number(time_ms)) for time_ms in first_times]
        return min(numbers)

    def _commit(self) -> None:
        """Commit the next window. Its events are ordered by time and id, whatever order they came
        in."""
        index = self._next
        number = self._first + index
        start_ms = number * self._length_ms + self._offset_ms
        end_ms = start_ms + self._length_ms
        window = self._writer.window(index, start_ms, end_ms)
        selected = self._take_pending(number)
        duplicates = 0
        if selected:
            duplicates = self._write(window, selected)
        self._normalizer.close_window()

        folder = self._writer.root / window_name(index)
        self._save(folder)
        window.commit(duplicates)
        self._next += 1
        if self._label_log:
            self._label_log.add_window(index)
        if self._progress:
            committed = self._stream.window(index)
            self._progress(index, committed.rows)

    def _take_pending(self, number: int) -> list[Rows]:
        """Remove and return the waiting events of a window."""
        selected = []
        remaining = []
        for raw, encoded in self._pending:
            in_window_N = self._window_number(encoded.times_N) == number
            selected.append(encoded.take(in_window_N))
            if in_window_N.all():
                continue
            later_N = ~in_window_N
            later_raw = raw.filter(pa.array(later_N))
            later_encoded = encoded.take(later_N)
            later = _Events(later_raw, later_encoded)
            remaining.append(later)
        self._pending = remaining
        return selected

    def _write(self, window: WindowWriter, parts: list[Rows]) -> int:
        """Write a window's events; returns the number of duplicates."""
        joined = Rows.joined(parts)
        by_time = np.lexsort((joined.example_id_N, joined.times_N))
        rows = joined.take(by_time)

        same_id = np.diff(rows.example_id_N) == 0
        same_time = np.diff(rows.times_N) == 0
        repeated_N = np.zeros(len(rows), bool)
        repeated_N[1:] = same_id & same_time
        if self._data.duplicates == "drop":
            rows = rows.take(~repeated_N)
        if len(rows):
            dense_ND = self._normalizer.apply(rows.dense_ND)
            window.append(rows.packed(self._writer.schema, dense_ND))
            self._normalizer.observe(rows.dense_ND)
        return int(repeated_N.sum())

    def _save(self, folder: AnyPath) -> None:
        """Write the follower's state beside the window that is about to be committed."""
        pending = pa.table({"event_time": pa.array([], pa.int64())})
        if self._pending:
            tables = [events.raw for events in self._pending]
            joined = pa.concat_tables(tables, promote_options="permissive")
            pending = _in_order(joined)
        with atomic_path(folder / PENDING) as temporary:
            pq.write_table(pending, temporary, compression="zstd")
        state = {
            "position": self._position,
            "newest_ms": self._newest_ms,
            "watermark_ms": self._watermark,
            "late_events": self._late,
            "normaliser": self._normalizer.dump(),  # spelled as in streams on disk
        }
        write_json(folder / STATE, state)

    def _finish(self) -> None:
        """Cut, release and close what is left, because nothing more will come."""
        if self._stream.complete:
            return
        self._cut(None)
        windows = [self._stream.window(index) for index in self._stream.windows()]
        rows = [window.rows for window in windows]
        duplicates = [window.duplicates for window in windows]
        statistics: dict[str, Any] = {
            "rows": sum(rows),
            "duplicates": sum(duplicates),
            "late_events": self._late,
        }
        if self._label_log:
            self._label_log.release(None)
            statistics["labels"] = self._label_log.statistics()
        statistics["dense"] = self._normalizer.state()
        self._writer.finish(statistics)


def _in_order(raw: pa.Table) -> pa.Table:
    keys = [
        ("event_time", "ascending"),
        ("example_id", "ascending"),
    ]
    in_order = raw.sort_by(keys)
    return in_order.combine_chunks()


def _times(arrival: Arrival) -> Array:
    """int64 (N,): event times in ms."""
    column = arrival.rows["event_time"]
    if column.null_count:
        raise UserError(
            f"{arrival.file}: {column.null_count} events without an event time; correct the file"
        )
    times_N = column.cast(pa.int64()).to_numpy()
    return np.asarray(times_N)
