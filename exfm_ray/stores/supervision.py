"""Supervision: the FM's predictions beside the stream's fragments, one row an example, in the same
order.

<store>/<teacher>/window=003/fragment=0000.parquet
    example_id  int64, teacher  string, snapshot  int32, prediction:<task>  float32 (a probability)
    for every task
<store>/<teacher>/window=003/manifest.json   written last
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from exfm_ray.base import FrozenModel
from exfm_ray.data.stream import Fragment, Window, list_values, read_parquet, window_name
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import atomic_path, write_json
from exfm_ray.storage.manifest import read_manifest
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.snapshot_policy import SnapshotPolicy

if TYPE_CHECKING:  # they import torch, seconds that no process that only reads need spend
    pass

TEACHER_COLUMN = (
    "teacher_predictions"  # float32[tasks of the job], added to a fragment's packed columns
)
IO_THREADS = 8
"""Fragments that are looked at side by side before a window is committed: of a remote store each is
a request."""


class NotScoredError(UserError):
    """A window that cannot be committed: its snapshot has not scored these fragments."""

    def __init__(self, told: str, fragments: Sequence[Fragment]) -> None:
        super().__init__(told)
        self.fragments = tuple(fragments)


def prediction_column(task: str) -> str:
    """Name of the column that holds the teacher's probability for a task."""
    return f"prediction:{task}"


class SupervisionManifest(FrozenModel):
    """The manifest of a window's supervision. `asked`: the version that was to supervise it, where
    that one is damaged and an older one did in its place."""

    window: int
    teacher: str
    snapshot: int
    tasks: tuple[str, ...]
    schema_digest: str
    rows: int
    fragments: tuple[str, ...]
    asked: int | None = None


@dataclass(frozen=True)
class SupervisionStore:
    """What one teacher wrote."""

    root: AnyPath
    teacher: str

    def path(self, window: int, fragment: Fragment) -> AnyPath:
        """The supervision of one fragment: the fragment's own file name."""
        return self.root / self.teacher / window_name(window) / PurePath(fragment.file).name

    def has(self, window: int) -> bool:
        """True when a window's supervision is committed."""
        return self._manifest(window).exists()

    def _manifest(self, window: int) -> AnyPath:
        return self.root / self.teacher / window_name(window) / "manifest.json"

    def manifest(self, window: int) -> SupervisionManifest:
        """The manifest of a committed window; UserError where it is missing or damaged."""
        path = self._manifest(window)
        if not path.exists():
            raise UserError(
                f"{path}: window {window} has no committed supervision of teacher '{self.teacher}'; run the DAS on it"
            )
        manifest = read_manifest(
            path, SupervisionManifest, "a supervision manifest", "remove the window's folder"
        )
        if (manifest.window, manifest.teacher) != (window, self.teacher):
            raise UserError(
                f"{path}: is of window {manifest.window} and teacher '{manifest.teacher}'; remove the window's folder"
            )
        return manifest

    def write(
        self,
        window: int,
        fragment: Fragment,
        ids: pa.ChunkedArray,
        snapshot: int,
        predictions: Mapping[str, np.ndarray],
    ) -> None:
        """Write one fragment's supervision atomically. NaN or infinite predictions are refused.

        Args:
            ids: int64, the fragment's example ids, in order.
            predictions: task -> float32 probabilities, in order.
        """
        path = self.path(window, fragment)
        for task, values in predictions.items():
            if not np.isfinite(values).all():
                raise UserError(
                    f"{path}: snapshot {snapshot} of teacher '{self.teacher}' predicts NaN for task '{task}'; nothing was written"
                )
        rows = len(ids)
        table = pa.table(
            {
                "example_id": ids,
                "teacher": pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [self.teacher]),
                "snapshot": np.full(rows, snapshot, np.int32),
                **{
                    prediction_column(task): values.astype(np.float32)
                    for task, values in predictions.items()
                },
            }
        )
        with atomic_path(path) as temporary:
            pq.write_table(
                table,
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
        """True when this fragment's supervision by this snapshot is on disk, whole: an interrupted
        window goes on from there."""
        path = self.path(window, fragment)
        if not path.exists():
            return False
        try:
            table = read_parquet(path, ["snapshot"])
        except (pa.ArrowException, OSError):  # damaged: score it again
            return False
        return (
            table.num_rows == fragment.rows
            and pc.all(pc.equal(table["snapshot"], snapshot)).as_py() is not False
        )

    def commit(
        self,
        window: Window,
        snapshot: int,
        tasks: Sequence[str],
        policy: SnapshotPolicy,
    ) -> None:
        """Make a window's supervision visible. Refuses a snapshot that may have learned from the
        window (rule 2).

        NotScoredError where this snapshot has not scored all fragments: one is missing, or an actor
            that was thought lost has come late and written over it with another snapshot.
        """
        if not policy.may_supervise(snapshot, window.index):
            raise UserError(
                f"window {window.index} must not be supervised by snapshot {snapshot} of teacher '{self.teacher}', which has learned "
                f"windows up to {snapshot - 1}: with das.fm_lag = {policy.fm_lag} it takes one that has learned none after "
                f"{window.index - policy.fm_lag}"
            )
        with ThreadPoolExecutor(IO_THREADS) as threads:
            whole = list(
                threads.map(
                    lambda fragment: self.is_written(window.index, fragment, snapshot),
                    window.fragments,
                )
            )
        if lacking := [
            fragment for fragment, there in zip(window.fragments, whole, strict=True) if not there
        ]:
            path = self.path(window.index, lacking[0])
            raise NotScoredError(
                f"{path}: not scored by snapshot {snapshot}; the window cannot be committed",
                lacking,
            )
        for torn in self._manifest(window.index).parent.glob(
            ".*.tmp"
        ):  # of actors that were killed
            torn.unlink(missing_ok=True)
        manifest = SupervisionManifest(
            window=window.index,
            teacher=self.teacher,
            snapshot=snapshot,
            tasks=tuple(tasks),
            rows=window.rows,
            schema_digest=window.schema_digest,
            fragments=tuple(f.file for f in window.fragments),
            asked=None
            if snapshot == policy.version(window.index)
            else policy.version(window.index),
        )
        write_json(self._manifest(window.index), manifest.model_dump(mode="json"))

    def join(
        self,
        window: int,
        fragment: Fragment,
        events: pa.Table,
        tasks: Sequence[str],
    ) -> pa.Table:
        """Add `TEACHER_COLUMN` to a fragment's rows; refuses supervision that is missing, stale or
        of other examples.

        Each row is checked: its id against the event's, its teacher and snapshot against the
            window's manifest, its value for being a probability.
        """
        path = self.path(window, fragment)
        manifest = self.manifest(window)
        for task in tasks:
            if task not in manifest.tasks:
                raise UserError(
                    f"{path}: no supervision for task '{task}'; this teacher writes {', '.join(manifest.tasks)}"
                )
        try:
            table = read_parquet(path)
        except FileNotFoundError:
            raise UserError(
                f"{path}: the manifest names this file, but it is not there; remove the window's folder and run the DAS"
            ) from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: not a readable Parquet file ({error}); remove the window's folder and run the DAS again"
            ) from None
        expected = {
            "example_id": pa.int64(),
            "snapshot": pa.int32(),
            **{prediction_column(t): pa.float32() for t in manifest.tasks},
        }
        if missing := sorted({"teacher", *expected} - set(table.column_names)):
            raise UserError(
                f"{path}: column '{missing[0]}' is missing; remove the window's folder and run the DAS again"
            )
        for column, kind in expected.items():
            if table[column].type != kind:
                raise UserError(
                    f"{path}: column '{column}' is {table[column].type}, not {kind}; remove the window's folder and run the DAS again"
                )
        if table.num_rows != events.num_rows:
            raise UserError(
                f"{path}: {table.num_rows} rows of supervision for {events.num_rows} examples; run the DAS on this window again"
            )
        self._check_column(
            path,
            pc.equal(table["example_id"], events["example_id"]),
            table["example_id"],
            events["example_id"],
            "example_id",
        )
        teacher = pc.cast(table["teacher"], pa.string())
        self._check_column(path, pc.equal(teacher, self.teacher), teacher, self.teacher, "teacher")
        self._check_column(
            path,
            pc.equal(table["snapshot"], manifest.snapshot),
            table["snapshot"],
            manifest.snapshot,
            "snapshot",
        )
        p_NT = np.stack(
            [table[prediction_column(task)].to_numpy() for task in tasks], axis=1
        ).astype(np.float32)
        wrong_NT = ~((p_NT >= 0) & (p_NT <= 1))  # NaN fails both
        if wrong_NT.any():
            row, column = np.argwhere(wrong_NT)[0]
            raise UserError(
                f"{path}: row {row}: {prediction_column(tasks[column])} is {p_NT[row, column]}, which is no probability; remove the window's "
                "folder and run the DAS on it again"
            )
        return events.append_column(
            TEACHER_COLUMN, pa.FixedSizeListArray.from_arrays(pa.array(p_NT.ravel()), len(tasks))
        )

    @staticmethod
    def _check_column(
        path: AnyPath,
        equal: pa.ChunkedArray,
        found: pa.ChunkedArray,
        expected: object,
        column: str,
    ) -> None:
        wrong = pc.index(pc.fill_null(equal, False), False).as_py()
        if wrong >= 0:
            wanted = expected[wrong].as_py() if isinstance(expected, pa.ChunkedArray) else expected
            raise UserError(
                f"{path}: row {wrong}: {column} is {found[wrong].as_py()!r}, {wanted!r} was expected: this supervision is stale or of other "
                "examples; remove the window's folder and run the DAS on it again"
            )


def teacher_values(table: pa.Table, tasks: int) -> np.ndarray | None:
    """float32 (rows, tasks) of the joined predictions, or None where the window has no
    supervision."""
    return (
        list_values(table[TEACHER_COLUMN], tasks) if TEACHER_COLUMN in table.column_names else None
    )
