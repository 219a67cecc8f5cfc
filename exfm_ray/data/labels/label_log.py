"""Decides into which release each label goes. The label's time and each window's deadline decide,
whatever order labels and events come in.

A label of window w, known at time s, goes into the release of w if s < deadline(w) = end(w) +
attribution. Otherwise it is late, and goes as a correction into the first later window v with s <
deadline(v). A release that is written is never changed: a label that comes after it goes into the
first release that is still open.

Shapes: P waiting labels, E events of a window, N new labels, L late labels, C corrections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exfm_ray.data.arrow_types import is_text
from exfm_ray.data.labels.corrections import CORRECTION, CORRECTIONS
from exfm_ray.data.labels.releases import ReleaseManifest, has_release, release, release_folder
from exfm_ray.data.stream import EventStream, Fragment, Window, domain_counts, window_name
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
    """Path of a part of the label log."""
    folder = root / "labels"
    return folder / f"part={number:06d}.parquet"


def write_part(
    root: AnyPath,
    number: int,
    labels: pa.Table,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write labels that came together as a part of the log.

    Args:
        root: folder of the stream.
        number: of the part.
        labels: rows with the columns of `LOG_SCHEMA`.
        facts: stored in the file's metadata, such as where the labels came from.
    """
    path = part_path(root, number)
    table = labels.select(LOG_SCHEMA.names).cast(LOG_SCHEMA)
    metadata = dict(facts) if facts else None
    with atomic_path(path) as temporary:
        pq.write_table(
            table.replace_schema_metadata(metadata),
            temporary,
            compression="zstd",
            write_statistics=False,
        )


@dataclass
class _WindowIds:
    """The example ids of a window, sorted, and the row of each in the window."""

    window: Window
    sorted_E: Array
    row_E: Array

    @classmethod
    def from_window(cls, stream: EventStream, index: int) -> _WindowIds:
        window = stream.window(index)
        parts = [np.empty(0, np.int64)]
        for fragment in window.fragments:
            table = stream.read(index, fragment, ["example_id"])
            parts.append(table["example_id"].to_numpy())
        ids_E = np.concatenate(parts)
        row_E = np.argsort(ids_E, kind="stable")
        return cls(window, ids_E[row_E], row_E)

    def find(self, ids_P: Array) -> Array:
        """Row in the window of each id, or UNKNOWN for an id of another window.

        If several examples share an id, its first example counts.
        """
        at_P = np.searchsorted(self.sorted_E, ids_P)
        matches_P = at_P < len(self.sorted_E)
        matches_P[matches_P] = self.sorted_E[at_P[matches_P]] == ids_P[matches_P]

        row_P = np.full(len(ids_P), UNKNOWN)
        row_P[matches_P] = self.row_E[at_P[matches_P]]
        return row_P


class _Delivery(NamedTuple):
    """Labels that a release delivers: ids on time, late ids, and the windows of the late ones."""

    on_time: Array
    late_L: Array
    origin_L: Array


@dataclass
class _TaskLabels:
    """The labels of one task: those that wait, ordered by id, and the ids of delivered ones."""

    attribution_ms: int
    id_P: Array = field(default_factory=lambda: np.empty(0, np.int64))
    time_P: Array = field(default_factory=lambda: np.empty(0, np.int64))
    window_P: Array = field(default_factory=lambda: np.empty(0, np.int64))
    delivered: Array = field(default_factory=lambda: np.empty(0, np.int64))
    next: int = 0
    positives: int = 0
    late: Counter[int] = field(default_factory=Counter)

    def add(self, id_N: Array, time_N: Array) -> None:
        """Add labels. The earliest one of an example counts, and none after a delivered one."""
        new_N = ~np.isin(id_N, self.delivered)
        new_windows = np.full(int(new_N.sum()), UNKNOWN)
        ids = np.concatenate([self.id_P, id_N[new_N]])
        times = np.concatenate([self.time_P, time_N[new_N]])
        windows = np.concatenate([self.window_P, new_windows])

        by_id = np.lexsort((-windows, times, ids))
        sorted_ids = ids[by_id]
        differs = np.diff(sorted_ids, prepend=sorted_ids[:1] - 1) != 0
        first = by_id[differs]
        self.id_P = ids[first]
        self.time_P = times[first]
        self.window_P = windows[first]

    def assign(self, ids: _WindowIds) -> None:
        """Note the window of the waiting labels whose examples lie in it."""
        open_P = np.flatnonzero(self.window_P == UNKNOWN)
        row_P = ids.find(self.id_P[open_P])
        matches_P = open_P[row_P != UNKNOWN]
        self.window_P[matches_P] = ids.window.index

    def take(self, window: Window) -> _Delivery:
        """Remove and return the labels that `window` delivers."""
        known_P = self.window_P != UNKNOWN
        not_later_P = self.window_P <= window.index
        before_deadline_P = self.time_P < self.deadline_ms(window)
        due_P = known_P & not_later_P & before_deadline_P
        on_time_P = due_P & (self.window_P == window.index)
        late_P = due_P & ~on_time_P

        delivery = _Delivery(self.id_P[on_time_P], self.id_P[late_P], self.window_P[late_P])
        self.delivered = np.union1d(self.delivered, self.id_P[due_P])
        self.id_P = self.id_P[~due_P]
        self.time_P = self.time_P[~due_P]
        self.window_P = self.window_P[~due_P]
        return delivery

    def deadline_ms(self, window: Window) -> int:
        """When the attribution time of a window is over."""
        attribution_ms = self.attribution_ms
        return window.end_ms + attribution_ms

    def statistics(self) -> dict[str, Any]:
        """Counts for the stream's manifest."""
        known_P = self.window_P != UNKNOWN
        undelivered = Counter(self.window_P[known_P].tolist())
        unknown_ids = self.id_P[~known_P]
        late = self.late + undelivered
        return {
            "positives": self.positives,
            "late": _sorted(late),
            "undelivered": undelivered.total(),
            "unknown": len(unknown_ids),
            "unknown_ids": unknown_ids[:LISTED].tolist(),
        }


def _sorted(counts: Counter[int]) -> dict[int, int]:
    """The counts in the order of their windows."""
    windows = sorted(counts)
    return {window: counts[window] for window in windows}


def _commit_order(manifest: ReleaseManifest) -> tuple[int, int]:
    """Sorts releases by the time at which they were written."""
    return manifest.parts, manifest.window


class LabelLog:
    """The labels of a stream. Add windows and parts of the log in the order of their commits.

    Holds 8 + 8 bytes for each event and 8 for each delivered label in memory. If the same windows
    and parts are added again after a kill, the log ends in the same state; releases that are on
    disk stay as they are.
    """

    def __init__(
        self,
        stream: EventStream,
        attribution_s: Mapping[str, int],
        correct: bool,
    ) -> None:
        """Start an empty log.

        Args:
            stream: the event stream.
            attribution_s: seconds of attribution by task.
            correct: whether late labels are delivered as corrections, or only counted.
        """
        self._stream = stream
        self._correct = correct
        self._labels: dict[str, _TaskLabels] = {}
        for task, seconds in attribution_s.items():
            self._labels[task] = _TaskLabels(seconds * 1000)
        self._windows: list[_WindowIds] = []
        self.parts = 0

    def add_window(self, index: int) -> None:
        """Add a committed window."""
        ids = _WindowIds.from_window(self._stream, index)
        self._windows.append(ids)
        for labels in self._labels.values():
            labels.assign(ids)

    def add_part(self) -> None:
        """Add the next written part of the label log."""
        path = part_path(self._stream.root, self.parts)
        table = pq.read_table(parquet_source(path), partitioning=None)
        id_N = table["example_id"].to_numpy()
        time_N = table["time_ms"].to_numpy()
        task_N = table["task"].to_numpy(zero_copy_only=False)
        positive_N = table["label"].to_numpy() == 1
        for task, labels in self._labels.items():
            selected_N = positive_N & (task_N == task)
            labels.add(id_N[selected_N], time_N[selected_N])
            for ids in self._windows:
                labels.assign(ids)
        self.parts += 1

    def recover(self) -> None:
        """Add all windows, parts and releases on disk, in the order they were added before."""
        for index in self._stream.windows():
            self.add_window(index)
        manifests = list(self._releases())
        manifests.sort(key=_commit_order)
        for manifest in manifests:
            while self.parts < manifest.parts:
                self.add_part()
            self._release(manifest.task)
        while part_path(self._stream.root, self.parts).exists():
            self.add_part()

    def _releases(self) -> Iterator[ReleaseManifest]:
        """Manifests of all releases on disk."""
        stream = self._stream
        for ids in self._windows:
            index = ids.window.index
            for task in self._labels:
                if not has_release(stream.root, index, task):
                    continue
                manifest = release(stream, index, task)
                yield manifest

    def release(self, clock_ms: int | None) -> None:
        """Release every window whose attribution time is over.

        Args:
            clock_ms: the current event time; None at the source's end, which releases all windows
                that are left.
        """
        for task, labels in self._labels.items():
            while labels.next < len(self._windows):
                window = self._windows[labels.next].window
                if clock_ms is not None and clock_ms < labels.deadline_ms(window):
                    break
                self._release(task)

    def _release(self, task: str) -> None:
        """Release the task's next window."""
        labels = self._labels[task]
        window = self._windows[labels.next].window
        delivery = labels.take(window)
        origin_counts = Counter(delivery.origin_L.tolist())
        labels.next += 1
        labels.positives += len(delivery.on_time)
        labels.late.update(origin_counts)
        if has_release(self._stream.root, window.index, task):
            return

        positives = self._write_labels(window, task, delivery.on_time)
        corrections = None
        if self._correct and len(delivery.late_L):
            corrections = self._write_corrections(window.index, task, delivery)
        manifest = ReleaseManifest(
            window=window.index,
            task=task,
            deadline_ms=labels.deadline_ms(window),
            parts=self.parts,
            rows=window.rows,
            positives=positives,
            late=_sorted(origin_counts),
            corrections=corrections,
            schema_digest=self._stream.schema.digest,
        )
        folder = release_folder(self._stream.root, window.index, task)
        path = folder / "manifest.json"
        write_json(path, manifest.model_dump(mode="json"))

    def _write_labels(
        self,
        window: Window,
        task: str,
        positive_ids: Array,
    ) -> int:
        """Write a label for each row of the window; returns the number of positives."""
        folder = release_folder(self._stream.root, window.index, task)
        positives = 0
        for fragment in window.fragments:
            events = self._stream.read(window.index, fragment, ["example_id"])
            ids = events["example_id"]
            label_E = np.isin(ids.to_numpy(), positive_ids)
            with atomic_path(folder / fragment.file) as temporary:
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
        delivery: _Delivery,
    ) -> Fragment:
        """Write window, fragment and row of the late labels' examples, in the order of the
        stream."""
        positions = []
        domains = []
        by_index = {ids.window.index: ids for ids in self._windows}
        for origin in np.unique(delivery.origin_L).tolist():
            late_ids = delivery.late_L[delivery.origin_L == origin]
            for table, domain_C in self._positions(by_index[origin], late_ids):
                positions.append(table)
                domains.append(domain_C)

        folder = self._stream.root / window_name(window)
        path = folder / f"{CORRECTIONS}{task}.parquet"
        joined = pa.concat_tables(positions)
        with atomic_path(path) as temporary:
            pq.write_table(joined, temporary, compression="zstd", write_statistics=False)
        return Fragment(
            file=path.name,
            rows=joined.num_rows,
            bytes=path.stat().st_size,
            domain_rows=domain_counts(np.concatenate(domains), self._stream.schema),
        )

    def _positions(self, ids: _WindowIds, late_ids: Array) -> Iterator[tuple[pa.Table, Array]]:
        """Positions of a window's late examples, and their domains, fragment by fragment."""
        window = ids.window
        row_C = np.sort(ids.find(late_ids))
        end_F = np.cumsum([fragment.rows for fragment in window.fragments])
        start_F = np.concatenate([[0], end_F])
        number_C = np.searchsorted(end_F, row_C, "right")
        in_fragment_C = row_C - start_F[number_C]

        for number in np.unique(number_C).tolist():
            rows = in_fragment_C[number_C == number]
            fragment = window.fragments[number]
            events = self._stream.read(window.index, fragment, ["example_id", "domain"])
            selected = events.take(pa.array(rows))
            columns = [
                selected["example_id"],
                np.full(len(rows), window.index),
                np.full(len(rows), number),
                rows,
            ]
            table = pa.table(columns, names=CORRECTION.names).cast(CORRECTION)
            yield table, selected["domain"].to_numpy()

    def statistics(self) -> dict[str, Any]:
        """Counts for the stream's manifest, by task: labels on time, late ones by window, and those
        that could not be delivered."""
        return {task: labels.statistics() for task, labels in self._labels.items()}


def check_labels(
    table: pa.Table,
    tasks: Mapping[str, int],
    name: str,
) -> pa.Table:
    """Check incoming labels and return them as rows of the log.

    Args:
        table: the labels as they came.
        tasks: tasks whose labels come after their events.
        name: names the file or topic in an error.

    Raises:
        UserError: names the file and the wrong column, task or value.
    """
    _check_label_columns(table, name)
    known = ", ".join(tasks)
    for task in table["task"].unique().to_pylist():
        if task not in tasks:
            raise UserError(
                f"{name}: labels of task '{task}', none of data.attribution_s "
                f"({known}); correct the file or the setting"
            )
    values = table["label"].unique()
    for value in values.to_pylist():
        if value not in (0, 1):
            raise UserError(f"{name}: column 'label' has the value {value}; labels are 0 or 1")
    return table.select(LOG_SCHEMA.names).cast(LOG_SCHEMA)


def _check_label_columns(table: pa.Table, name: str) -> None:
    expected = ", ".join(LABEL_COLUMNS)
    actual = ", ".join(table.column_names)
    for column, (meaning, fits) in LABEL_COLUMNS.items():
        if column not in table.column_names:
            raise UserError(
                f"{name}: no column '{column}'; a label file has {expected}, this one {actual}"
            )
        kind = table[column].type
        missing = table[column].null_count
        if not fits(kind):
            raise UserError(f"{name}: column '{column}' is {kind}; {meaning} in every row")
        if missing:
            raise UserError(
                f"{name}: column '{column}' has {missing} missing values; {meaning} in every row"
            )


def _is_zero_or_one(kind: pa.DataType) -> bool:
    types = pa.types
    whole = types.is_integer(kind) or types.is_boolean(kind)
    return bool(whole or types.is_floating(kind))


LABEL_COLUMNS = {
    "example_id": ("an integer", pa.types.is_integer),
    "task": ("the name of a task", is_text),
    "label": ("0 or 1", _is_zero_or_one),
    "time_ms": ("milliseconds since the epoch, an integer,", pa.types.is_integer),
}
"""Columns of a label file: what each holds, in words and as a test of its type."""
