"""Supervision: a teacher's predictions beside the stream's fragments, one row per example.

The rows have the order of the fragment's examples.

    <store>/<teacher>/window=003/fragment=0000.parquet
        example_id         int64
        teacher            string
        snapshot           int32
        prediction:<task>  float32, a probability; one column per task
    <store>/<teacher>/window=003/manifest.json   written last
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePath
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from exfm_ray.data.stream import Fragment, Window, list_values, read_parquet
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import atomic_path
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.base import WindowManifest, WindowStore
from exfm_ray.stores.snapshot_policy import SnapshotPolicy

TEACHER_COLUMN = "teacher_predictions"
"""Column of the joined rows: float32 [tasks of the job], the teacher's probabilities."""
IO_THREADS = 8
"""Fragments that are checked in parallel before a commit; in a remote store each is a request."""


class NotScoredError(UserError):
    """A window that cannot be committed because its snapshot has not scored `fragments`."""

    def __init__(self, message: str, fragments: Sequence[Fragment]) -> None:
        super().__init__(message)
        self.fragments = tuple(fragments)


def prediction_column(task: str) -> str:
    """Return the name of the column with the teacher's probability for a task."""
    return f"prediction:{task}"


class SupervisionManifest(WindowManifest):
    """The manifest of a window's supervision.

    Attributes:
        tasks: tasks that the teacher predicts.
        schema_digest: digest of the stream's schema.
        rows: examples of the window.
        fragments: file names of the stream's fragments.
        asked: the damaged version that `snapshot` replaced as a fallback, None if it replaced none.
    """

    tasks: tuple[str, ...]
    schema_digest: str
    rows: int
    fragments: tuple[str, ...]
    asked: int | None = None


@dataclass(frozen=True)
class SupervisionStore(WindowStore):
    """The supervision by one teacher."""

    contents: ClassVar[str] = "supervision"

    def path(self, window: int, fragment: Fragment) -> AnyPath:
        """Return the file of one fragment's supervision, named like the fragment's own file."""
        return self.folder(window) / PurePath(fragment.file).name

    def manifest(self, window: int) -> SupervisionManifest:
        """Read the manifest of a committed window.

        Raises:
            UserError: it is missing, damaged, or of another window or teacher.
        """
        return self._read_manifest(window, SupervisionManifest)

    def write(
        self,
        window: int,
        fragment: Fragment,
        ids: pa.ChunkedArray,
        snapshot: int,
        predictions: Mapping[str, np.ndarray],
    ) -> None:
        """Write one fragment's supervision atomically.

        Args:
            window: index of the window.
            fragment: the fragment.
            ids: int64, the fragment's example ids, in order.
            snapshot: version that made the predictions.
            predictions: task -> float32 probabilities, in order.

        Raises:
            UserError: a prediction is NaN or infinite.
        """
        path = self.path(window, fragment)
        for task, values in predictions.items():
            if not np.isfinite(values).all():
                raise UserError(
                    f"{path}: snapshot {snapshot} of teacher '{self.teacher}' predicts NaN for "
                    f"task '{task}'; nothing was written"
                )

        rows = len(ids)
        index_N = np.zeros(rows, np.int32)
        columns = {
            "example_id": ids,
            "teacher": pa.DictionaryArray.from_arrays(index_N, [self.teacher]),
            "snapshot": np.full(rows, snapshot, np.int32),
        }
        for task, values in predictions.items():
            columns[prediction_column(task)] = values.astype(np.float32)

        with atomic_path(path) as temporary:
            pq.write_table(
                pa.table(columns),
                temporary,
                compression="zstd",
                use_dictionary=["teacher", "snapshot"],
                column_encoding={"example_id": "DELTA_BINARY_PACKED"},
                write_page_checksum=True,
            )

    def is_written(
        self,
        window: int,
        fragment: Fragment,
        snapshot: int,
    ) -> bool:
        """Return True if this snapshot's supervision of the fragment is complete on disk.

        An interrupted window resumes from there.
        """
        path = self.path(window, fragment)
        if not path.exists():
            return False
        try:
            table = read_parquet(path, ["snapshot"])
        except (pa.ArrowException, OSError):  # damaged: score it again
            return False

        matches = pc.equal(table["snapshot"], snapshot)
        # `all` of an empty fragment is None, which is fine.
        return table.num_rows == fragment.rows and pc.all(matches).as_py() is not False

    def commit(
        self,
        window: Window,
        snapshot: int,
        tasks: Sequence[str],
        policy: SnapshotPolicy,
    ) -> None:
        """Make a window's supervision visible.

        Raises:
            UserError: the snapshot may have learned from the window (rule 2).
            NotScoredError: this snapshot has not scored all fragments. One is missing, or a late
                actor has overwritten it with another snapshot's predictions.
        """
        policy.refuse_later_snapshot(snapshot, window.index, "supervised by")
        self._check_scored(window, snapshot)
        for partial in self.folder(window.index).glob(".*.tmp"):  # left by actors that were killed
            partial.unlink(missing_ok=True)

        self._write_manifest(
            SupervisionManifest(
                window=window.index,
                teacher=self.teacher,
                snapshot=snapshot,
                tasks=tuple(tasks),
                rows=window.rows,
                schema_digest=window.schema_digest,
                fragments=tuple(fragment.file for fragment in window.fragments),
                asked=policy.replaced_version(snapshot, window.index),
            )
        )

    def _check_scored(self, window: Window, snapshot: int) -> None:
        def is_written(fragment: Fragment) -> bool:
            return self.is_written(window.index, fragment, snapshot)

        with ThreadPoolExecutor(IO_THREADS) as threads:
            written = list(threads.map(is_written, window.fragments))
        pairs = zip(window.fragments, written, strict=True)
        missing = [fragment for fragment, is_complete in pairs if not is_complete]
        if missing:
            path = self.path(window.index, missing[0])
            raise NotScoredError(
                f"{path}: not scored by snapshot {snapshot}; the window cannot be committed",
                missing,
            )

    def join(
        self,
        window: int,
        fragment: Fragment,
        events: pa.Table,
        tasks: Sequence[str],
    ) -> pa.Table:
        """Add `TEACHER_COLUMN` to a fragment's rows.

        Each row is checked: its id against the event's, its teacher and snapshot against the
        window's manifest, and that its value is a probability.

        Args:
            window: index of the window.
            fragment: the fragment.
            events: the fragment's rows, in order.
            tasks: tasks of the job, in the order of the column's values.

        Raises:
            UserError: the supervision is missing, stale, or of other examples.
        """
        path = self.path(window, fragment)
        manifest = self.manifest(window)
        for task in tasks:
            if task not in manifest.tasks:
                raise UserError(
                    f"{path}: no supervision for task '{task}'; "
                    f"this teacher writes {', '.join(manifest.tasks)}"
                )

        table = self._read_fragment(window, path)
        self._check_columns(window, path, table, manifest.tasks)
        if table.num_rows != events.num_rows:
            raise UserError(
                f"{path}: {table.num_rows} rows of supervision for {events.num_rows} examples; "
                "run the DAS on this window again"
            )
        self._check_values(window, path, "example_id", table, events["example_id"])
        self._check_values(window, path, "teacher", table, self.teacher)
        self._check_values(window, path, "snapshot", table, manifest.snapshot)

        p_NT = self._probabilities(window, path, table, tasks)
        column = pa.FixedSizeListArray.from_arrays(pa.array(p_NT.ravel()), len(tasks))
        return events.append_column(TEACHER_COLUMN, column)

    def _read_fragment(self, window: int, path: AnyPath) -> pa.Table:
        try:
            return read_parquet(path)
        except FileNotFoundError:
            raise UserError(
                f"{path}: the manifest names this file, but it is not there; "
                f"{self.rebuild_hint(window)}"
            ) from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: not a readable Parquet file ({error}); {self.rebuild_hint(window)}"
            ) from None

    def _check_columns(
        self,
        window: int,
        path: AnyPath,
        table: pa.Table,
        tasks: Sequence[str],
    ) -> None:
        """Refuse a table without the expected columns, or with columns of other types."""
        types = {"example_id": pa.int64(), "snapshot": pa.int32()}
        types |= {prediction_column(task): pa.float32() for task in tasks}
        missing = sorted({"teacher", *types} - set(table.column_names))
        if missing:
            raise UserError(
                f"{path}: column '{missing[0]}' is missing; {self.rebuild_hint(window)}"
            )
        for column, kind in types.items():
            if table[column].type != kind:
                raise UserError(
                    f"{path}: column '{column}' is {table[column].type}, not {kind}; "
                    f"{self.rebuild_hint(window)}"
                )

    def _check_values(
        self,
        window: int,
        path: AnyPath,
        column: str,
        table: pa.Table,
        expected: pa.ChunkedArray | str | int,
    ) -> None:
        """Refuse a column whose values differ from the expected ones; null is a difference."""
        values = table[column]
        if isinstance(expected, str):
            values = pc.cast(values, pa.string())
        is_equal = pc.fill_null(pc.equal(values, expected), False)
        row = pc.index(is_equal, False).as_py()
        if row < 0:
            return

        expected_value = expected
        if isinstance(expected, pa.ChunkedArray):
            expected_value = expected[row].as_py()
        raise UserError(
            f"{path}: row {row}: {column} is {values[row].as_py()!r}, {expected_value!r} was "
            "expected: this supervision is stale or of other examples; "
            f"{self.rebuild_hint(window)}"
        )

    def _probabilities(
        self,
        window: int,
        path: AnyPath,
        table: pa.Table,
        tasks: Sequence[str],
    ) -> np.ndarray:
        """Return float32 (rows, tasks); refuse values that are no probabilities."""
        columns = [table[prediction_column(task)].to_numpy() for task in tasks]
        p_NT = np.stack(columns, axis=1).astype(np.float32)
        is_wrong_NT = ~((p_NT >= 0) & (p_NT <= 1))  # NaN fails both comparisons
        if is_wrong_NT.any():
            row, column = np.argwhere(is_wrong_NT)[0]
            raise UserError(
                f"{path}: row {row}: {prediction_column(tasks[column])} is {p_NT[row, column]}, "
                f"which is no probability; {self.rebuild_hint(window)}"
            )
        return p_NT


def teacher_values(table: pa.Table, tasks: int) -> np.ndarray | None:
    """Return the joined predictions, float32 (rows, tasks); None if the window has no teacher."""
    if TEACHER_COLUMN not in table.column_names:
        return None
    return list_values(table[TEACHER_COLUMN], tasks)
