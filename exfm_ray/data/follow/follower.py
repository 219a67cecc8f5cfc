"""Follows a stream without an end: events in any order become windows, labels in any order become
releases.

A window is cut when the watermark, the newest event time so far less `data.follow.lateness_s`, has
passed its end. An event of a window that was cut before it came is counted and dropped. What was
taken is stored with each window, so that a killed follower goes on as if nothing had happened:

    <stream>/window=003/follow.json      position in the source, newest event time, watermark, late events, normaliser
    <stream>/window=003/pending.parquet  raw events that came by then and belong to later windows
    <stream>/labels/part=000003.parquet  labels that came together, with the position behind them
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from exfm_ray.data.stream import EventStream, StreamWriter, window_name
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


class Follower:
    """Takes arrivals one by one. All of its state is on disk whenever a window or a part of the
    label log is committed."""

    def __init__(
        self,
        config: Config,
        writer: StreamWriter,
        arrivals: Arrivals,
        source: RawSource,
        progress: Progress | None = None,
    ) -> None:
        """`source`: what events are; `arrivals` say where they are from."""
        assert config.data.follow
        self._data = config.data
        self._follow = config.data.follow
        self._writer = writer
        self._arrivals = arrivals
        self._progress = progress
        self._length_ms = self._data.window.length_s * 1000
        self._offset_ms = self._data.window.offset_s * 1000
        self._stream = EventStream(writer.root, writer.schema)
        self._normaliser = Normalizer([d.name for d in writer.schema.dense])
        self._source = source
        self._pending: list[tuple[pa.Table, Rows]] = []
        self._position: Position = {}
        self._label_position: Position = {}
        self._newest_ms: int | None = None
        self._watermark = FIRST
        self._late = 0
        self._ledger: LabelLog | None = None
        if self._data.delayed:
            told = {"attribution_s": self._data.delayed, "late_labels": self._data.late_labels}
            write_json(writer.root / ATTRIBUTION, told)
            self._ledger = LabelLog(
                self._stream, self._data.delayed, self._data.late_labels == "correct"
            )
        self._recover()

    def _recover(self) -> None:
        if self._ledger:
            self._ledger.recover()
            if self._ledger.parts:
                facts = pq.read_schema(
                    parquet_source(part_path(self._writer.root, self._ledger.parts - 1))
                ).metadata
                self._label_position = json.loads(metadata_value(facts, POSITION) or "{}")
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
        self._first = self._absolute(self._stream.window(0).start_ms)
        self._normaliser.restore(state["normaliser"])
        pending = pq.read_table(parquet_source(folder / PENDING), partitioning=None)
        if pending.num_rows:
            self._add(pending, Path(PENDING))

    def poll(self) -> bool:
        """Take all that has come; True when the stream has ended and is complete."""
        ended = self._arrivals.ended()  # asked first: what came before the end is seen below
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
        while not self.poll():
            time.sleep(self._follow.poll_s)

    def _take_labels(self) -> None:
        while self._ledger and (arrival := self._arrivals.labels(self._label_position)):
            write_part(
                self._writer.root,
                self._ledger.parts,
                arrival.rows,
                {POSITION: json.dumps(arrival.position)},
            )
            self._ledger.add_part()
            self._label_position = arrival.position

    def _take_events(self, arrival: Arrival) -> None:
        if arrival.rows.num_rows:
            late_N = self._late_events(_times(arrival), arrival.held_ms)
            self._late += int(late_N.sum())
            on_time = arrival.rows.filter(pa.array(~late_N))
            if on_time.num_rows:
                self._add(on_time, arrival.file)
        self._position = arrival.position
        if self._newest_ms is not None:
            newest = (
                self._newest_ms
                if arrival.held_ms is None
                else min(self._newest_ms, arrival.held_ms)
            )
            self._watermark = max(self._watermark, newest - self._follow.lateness_s * 1000)
            self._cut(int(self._absolute(self._watermark)))
            if self._ledger:
                self._ledger.release(self._watermark)

    def _late_events(self, times_N: Array, held_ms: int | None) -> Array:
        """Which events are of windows that are cut: by the events before each alone, so that it
        does not matter in how many pieces they came; where queues are read side by side, by those
        of earlier arrivals. Notes the newest time."""
        newest_N = np.maximum.accumulate(times_N)
        watermark_N = np.concatenate([[times_N[0]], newest_N[:-1]]) - self._follow.lateness_s * 1000
        if held_ms is not None:
            watermark_N = np.full(len(times_N), self._watermark)
        self._newest_ms = int(
            newest_N[-1] if self._newest_ms is None else max(newest_N[-1], self._newest_ms)
        )
        return np.asarray(
            self._absolute(times_N) < self._absolute(np.maximum(watermark_N, self._watermark))
        )

    def _add(self, raw: pa.Table, file: Path) -> None:
        raw = _in_order(raw)
        self._pending.append(
            (raw, Packer(replace(self._source, files=(file,)), drop_duplicates=False).encode(raw))
        )

    def _absolute(self, times: Any) -> Any:
        return (times - self._offset_ms) // self._length_ms

    def _cut(self, end: int | None) -> None:
        """Commit the windows before the absolute number `end`; all that there are events for
        (None)."""
        while self._pending:
            earliest = min(int(self._absolute(int(rows.times_N[0]))) for _, rows in self._pending)
            if end is not None and earliest >= end:
                return
            if not self._next:
                self._first = earliest
            gap = earliest - self._first - self._next
            if gap and self._data.window.empty == "error":
                raise UserError(
                    f"{self._pending[0][1].times_N[0]} ms: {gap} empty windows before the event at that time; is the unit of the event time right? "
                    f"Otherwise raise data.window.length_s ({self._data.window.length_s}), or set data.window.empty=keep"
                )
            for _ in range(gap + 1):
                self._commit()

    def _commit(self) -> None:
        """Commit the next window: its events in the order of time and id, whatever order they came
        in."""
        number = self._first + self._next
        index = self._next
        start_ms = number * self._length_ms + self._offset_ms
        chosen = []
        kept = []
        for raw, rows in self._pending:
            mine_N = self._absolute(rows.times_N) == number
            chosen.append(rows.take(mine_N))
            if not mine_N.all():
                kept.append((raw.filter(pa.array(~mine_N)), rows.take(~mine_N)))
        window = self._writer.window(index, start_ms, start_ms + self._length_ms)
        duplicates = 0
        if chosen:
            rows = Rows.joined(chosen)
            rows = rows.take(np.lexsort((rows.example_id_N, rows.times_N)))
            repeated_N = np.zeros(len(rows), bool)
            repeated_N[1:] = (np.diff(rows.example_id_N) == 0) & (np.diff(rows.times_N) == 0)
            duplicates = int(repeated_N.sum())
            if self._data.duplicates == "drop":
                rows = rows.take(~repeated_N)
            if len(rows):
                window.append(
                    rows.packed(self._writer.schema, self._normaliser.apply(rows.dense_ND))
                )
                self._normaliser.observe(rows.dense_ND)
        self._normaliser.close_window()
        self._pending = kept
        self._save(self._writer.root / window_name(index))
        window.commit(duplicates)
        self._next += 1
        if self._ledger:
            self._ledger.add_window(index)
        if self._progress:
            self._progress(index, self._stream.window(index).rows)

    def _save(self, folder: AnyPath) -> None:
        tables = [raw for raw, _ in self._pending] or [
            pa.table({"event_time": pa.array([], pa.int64())})
        ]
        joined = pa.concat_tables(tables, promote_options="permissive")
        with atomic_path(folder / PENDING) as temporary:
            pq.write_table(
                _in_order(joined) if self._pending else joined, temporary, compression="zstd"
            )
        state = {
            "position": self._position,
            "newest_ms": self._newest_ms,
            "watermark_ms": self._watermark,
            "late_events": self._late,
        }
        write_json(folder / STATE, state | {"normaliser": self._normaliser.dump()})

    def _finish(self) -> None:
        """Nothing more will come: cut, release and close what is left."""
        if self._stream.complete:
            return
        self._cut(None)
        windows = [self._stream.window(w) for w in self._stream.windows()]
        told: dict[str, Any] = {
            "rows": sum(w.rows for w in windows),
            "duplicates": sum(w.duplicates for w in windows),
            "late_events": self._late,
        }
        if self._ledger:
            self._ledger.release(None)
            told["labels"] = self._ledger.statistics()
        self._writer.finish(told | {"dense": self._normaliser.state()})


def _in_order(raw: pa.Table) -> pa.Table:
    return raw.sort_by([("event_time", "ascending"), ("example_id", "ascending")]).combine_chunks()


def _times(arrival: Arrival) -> Array:
    column = arrival.rows["event_time"]
    if column.null_count:
        raise UserError(
            f"{arrival.file}: {column.null_count} events without an event time; correct the file"
        )
    return np.asarray(column.cast(pa.int64()).to_numpy())
