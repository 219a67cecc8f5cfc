"""Decides which label goes into which release: by its time against each window's deadline, whatever
order labels and events come in.

A label of window w, known at time s, goes into the release of w where s < deadline(w) = end(w) +
attribution. Otherwise it is late, and goes as a correction into the first later window v with s <
deadline(v). A release that is written is never changed: a label that comes after it goes into the
first one that is still open.

Shapes: P labels that wait, E events of a window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exfm_ray.data.labels.corrections import CORRECTION, CORRECTIONS
from exfm_ray.data.labels.releases import ReleaseManifest, release, release_folder
from exfm_ray.data.stream import EventStream, Fragment, Window, window_name
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import atomic_path, parquet_source, write_json
from exfm_ray.storage.remote import AnyPath

Array = np.ndarray[Any, Any]
LOG_SCHEMA = pa.schema(
    [
        ("example_id", pa.int64()),
        ("task", pa.string()),
        ("label", pa.int8()),
        ("time_ms", pa.int64()),
    ]
)
UNKNOWN = -1
LISTED = 10


def part_path(root: AnyPath, number: int) -> AnyPath:
    """A part of the label log."""
    return root / "labels" / f"part={number:06d}.parquet"


def write_part(
    root: AnyPath,
    number: int,
    labels: pa.Table,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write labels that came together as a part of the log; `facts` say where they came from."""
    with atomic_path(part_path(root, number)) as temporary:
        table = labels.select(LOG_SCHEMA.names).cast(LOG_SCHEMA)
        pq.write_table(
            table.replace_schema_metadata(dict(facts) if facts else None),
            temporary,
            compression="zstd",
            write_statistics=False,
        )


@dataclass
class _Ids:
    """Where a window's examples lie."""

    window: Window
    sorted_E: Array
    place_E: Array

    @classmethod
    def from_window(cls, stream: EventStream, index: int) -> _Ids:
        window = stream.window(index)
        parts = [
            stream.read(index, f, ["example_id"])["example_id"].to_numpy() for f in window.fragments
        ]
        ids_E = np.concatenate([np.empty(0, np.int64), *parts])
        place_E = np.argsort(ids_E, kind="stable")
        return cls(window, ids_E[place_E], place_E)

    def find(self, ids_P: Array) -> Array:
        """Place in the window of each id, of its first example where several share it; UNKNOWN
        where it is of another window."""
        at_P = np.searchsorted(self.sorted_E, ids_P)
        here_P = at_P < len(self.sorted_E)
        here_P[here_P] = self.sorted_E[at_P[here_P]] == ids_P[here_P]
        found_P = np.full(len(ids_P), UNKNOWN)
        found_P[here_P] = self.place_E[at_P[here_P]]
        return found_P


@dataclass
class _TaskLabels:
    """The labels of one task: those that wait, in the order of their ids, and the ids of those that
    were delivered."""

    attribution_ms: int
    id_P: Array = field(default_factory=lambda: np.empty(0, np.int64))
    time_P: Array = field(default_factory=lambda: np.empty(0, np.int64))
    window_P: Array = field(default_factory=lambda: np.empty(0, np.int64))
    told: Array = field(default_factory=lambda: np.empty(0, np.int64))
    next: int = 0
    positives: int = 0
    late: Counter[int] = field(default_factory=Counter)

    def add(self, ids: Array, times: Array) -> None:
        """Take in labels; of several for one example the earliest counts, and none after one that
        was delivered."""
        new = ~np.isin(ids, self.told)
        ids = np.concatenate([self.id_P, ids[new]])
        times = np.concatenate([self.time_P, times[new]])
        windows = np.concatenate([self.window_P, np.full(int(new.sum()), UNKNOWN)])
        order = np.lexsort((-windows, times, ids))
        keep = order[np.diff(ids[order], prepend=ids[order[:1]] - 1) != 0]
        self.id_P = ids[keep]
        self.time_P = times[keep]
        self.window_P = windows[keep]

    def place(self, ids: _Ids) -> None:
        """Note the window of the labels that are of this one."""
        open_P = np.flatnonzero(self.window_P == UNKNOWN)
        self.window_P[open_P[ids.find(self.id_P[open_P]) != UNKNOWN]] = ids.window.index

    def take(self, window: Window) -> tuple[Array, Array, Array]:
        """Remove and return what `window` delivers: ids that are on time, late ids, and the windows
        of these."""
        due_P = (
            (self.window_P != UNKNOWN)
            & (self.window_P <= window.index)
            & (self.time_P < self.deadline_ms(window))
        )
        own_P = due_P & (self.window_P == window.index)
        late_P = due_P & ~own_P
        taken = self.id_P[own_P], self.id_P[late_P], self.window_P[late_P]
        self.told = np.union1d(self.told, self.id_P[due_P])
        self.id_P = self.id_P[~due_P]
        self.time_P = self.time_P[~due_P]
        self.window_P = self.window_P[~due_P]
        return taken

    def deadline_ms(self, window: Window) -> int:
        """When the attribution time of a window is over."""
        return window.end_ms + self.attribution_ms


class LabelLog:
    """The labels of a stream. Windows and parts of the log are told to it in the order in which
    they are committed.

    It holds 8 + 8 bytes for each event and 8 for each delivered label in memory. Told the same
    again after a kill, it ends in the same state; releases that are on disk stay as they are.
    """

    def __init__(
        self,
        stream: EventStream,
        attribution_s: Mapping[str, int],
        correct: bool,
    ) -> None:
        """`correct`: late labels are delivered as corrections, not only counted."""
        self._stream = stream
        self._correct = correct
        self._books = {task: _TaskLabels(s * 1000) for task, s in attribution_s.items()}
        self._windows: list[_Ids] = []
        self.parts = 0

    def add_window(self, index: int) -> None:
        """A window is committed."""
        ids = _Ids.from_window(self._stream, index)
        self._windows.append(ids)
        for book in self._books.values():
            book.place(ids)

    def add_part(self) -> None:
        """The next part of the label log is written."""
        path = part_path(self._stream.root, self.parts)
        table = pq.read_table(parquet_source(path), partitioning=None)
        task_N = table["task"].to_numpy(zero_copy_only=False)
        label_N = table["label"].to_numpy()
        for task, book in self._books.items():
            mine = (task_N == task) & (label_N == 1)
            book.add(table["example_id"].to_numpy()[mine], table["time_ms"].to_numpy()[mine])
            for ids in self._windows:
                book.place(ids)
        self.parts += 1

    def recover(self) -> None:
        """Take up all windows, parts and releases that are on disk, as they were told before a
        kill."""
        for index in self._stream.windows():
            self.add_window(index)
        found = [
            release(self._stream, ids.window.index, task)
            for ids in self._windows
            for task in self._books
            if self._is_released(ids, task)
        ]
        for done in sorted(found, key=lambda one: (one.parts, one.window)):
            while self.parts < done.parts:
                self.add_part()
            self._release(done.task)
        while part_path(self._stream.root, self.parts).exists():
            self.add_part()

    def _is_released(self, ids: _Ids, task: str) -> bool:
        return (
            release_folder(self._stream.root, ids.window.index, task) / "manifest.json"
        ).exists()

    def release(self, clock_ms: int | None) -> None:
        """Release every window whose attribution time is over at `clock_ms` of event time; all that
        are left at the source's end (None)."""
        for task, book in self._books.items():
            while book.next < len(self._windows):
                if clock_ms is not None and clock_ms < book.deadline_ms(
                    self._windows[book.next].window
                ):
                    break
                self._release(task)

    def _release(self, task: str) -> None:
        """Release the task's next window."""
        book = self._books[task]
        ids = self._windows[book.next]
        own, late, origin = book.take(ids.window)
        book.next += 1
        book.positives += len(own)
        book.late.update(origin.tolist())
        if self._is_released(ids, task):
            return
        positives = self._write_labels(ids.window, task, own)
        corrections = (
            self._write_corrections(ids.window.index, task, late, origin)
            if len(late) and self._correct
            else None
        )
        manifest = ReleaseManifest(
            window=ids.window.index,
            task=task,
            deadline_ms=book.deadline_ms(ids.window),
            parts=self.parts,
            rows=ids.window.rows,
            positives=positives,
            late=dict(sorted(Counter(origin.tolist()).items())),
            corrections=corrections,
            schema_digest=self._stream.schema.digest,
        )
        write_json(
            release_folder(self._stream.root, ids.window.index, task) / "manifest.json",
            manifest.model_dump(mode="json"),
        )

    def _write_labels(
        self,
        window: Window,
        task: str,
        own: Array,
    ) -> int:
        positives = 0
        for fragment in window.fragments:
            ids = self._stream.read(window.index, fragment, ["example_id"])["example_id"]
            label_E = np.isin(ids.to_numpy(), own)
            with atomic_path(
                release_folder(self._stream.root, window.index, task) / fragment.file
            ) as temporary:
                pq.write_table(
                    pa.table({"example_id": ids, "label": label_E}),
                    temporary,
                    compression="zstd",
                    use_dictionary=False,
                    column_encoding={"example_id": "DELTA_BINARY_PACKED"},
                    write_statistics=False,
                )
            positives += int(label_E.sum())
        return positives

    def _write_corrections(
        self,
        window: int,
        task: str,
        late: Array,
        origin: Array,
    ) -> Fragment:
        """Say where the late labels' examples lie: window, fragment, row; in the order of the
        stream."""
        places = []
        domains = []
        known = {ids.window.index: ids for ids in self._windows}
        for index in np.unique(origin).tolist():
            ids = known[index]
            mine = late[origin == index]
            place = np.sort(ids.find(mine))
            ends = np.cumsum([f.rows for f in ids.window.fragments])
            fragment = np.searchsorted(ends, place, "right")
            row = place - np.concatenate([[0], ends])[fragment]
            for number in np.unique(fragment).tolist():
                here = row[fragment == number]
                events = self._stream.read(
                    index, ids.window.fragments[number], ["example_id", "domain"]
                ).take(pa.array(here))
                columns = [
                    events["example_id"],
                    np.full(len(here), index),
                    np.full(len(here), number),
                    here,
                ]
                places.append(pa.table(columns, names=CORRECTION.names).cast(CORRECTION))
                domains.append(events["domain"].to_numpy())
        path = self._stream.root / window_name(window) / f"{CORRECTIONS}{task}.parquet"
        table = pa.concat_tables(places)
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_statistics=False)
        counts = np.bincount(np.concatenate(domains), minlength=len(self._stream.schema.domains))
        return Fragment(
            file=path.name,
            rows=table.num_rows,
            bytes=path.stat().st_size,
            domain_rows=tuple(int(c) for c in counts),
        )

    def statistics(self) -> dict[str, Any]:
        """For the stream's manifest: by task how many labels were on time, late by window, and what
        could not be delivered."""
        told = {}
        for task, book in self._books.items():
            undelivered = Counter(book.window_P[book.window_P != UNKNOWN].tolist())
            strangers = book.id_P[book.window_P == UNKNOWN]
            told[task] = {
                "positives": book.positives,
                "late": dict(sorted((book.late + undelivered).items())),
                "undelivered": undelivered.total(),
                "unknown": len(strangers),
                "unknown_ids": strangers[:LISTED].tolist(),
            }
        return told


def check_labels(
    table: pa.Table,
    tasks: Mapping[str, int],
    name: str,
) -> pa.Table:
    """Incoming labels as rows of the log; UserError names the file and the column, task or value at
    fault."""
    for column, (wanted, fits) in LABEL_COLUMNS.items():
        if column not in table.column_names:
            raise UserError(
                f"{name}: no column '{column}'; a label file has {', '.join(LABEL_COLUMNS)}, this one {', '.join(table.column_names)}"
            )
        if not fits(table[column].type) or table[column].null_count:
            what = (
                f"is {table[column].type}"
                if not fits(table[column].type)
                else f"has {table[column].null_count} missing values"
            )
            raise UserError(f"{name}: column '{column}' {what}; {wanted} in every row")
    for task in table["task"].unique().to_pylist():
        if task not in tasks:
            raise UserError(
                f"{name}: labels of task '{task}', none of data.attribution_s ({', '.join(tasks)}); correct the file or the setting"
            )
    for value in table["label"].unique().to_pylist():
        if value not in (0, 1):
            raise UserError(f"{name}: column 'label' has the value {value}; labels are 0 or 1")
    return table.select(LOG_SCHEMA.names).cast(LOG_SCHEMA)


LABEL_COLUMNS = {
    "example_id": ("an integer", pa.types.is_integer),
    "task": (
        "the name of a task",
        lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    ),
    "label": (
        "0 or 1",
        lambda kind: (
            pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)
        ),
    ),
    "time_ms": ("milliseconds since the epoch, an integer,", pa.types.is_integer),
}
"""Of label files: what each column holds, in words and as a test of its type."""
