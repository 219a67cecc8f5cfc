"""What a DAS does: which stream it labels, by which teacher, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exfm_ray.config.das import DASConfig, TeacherConfig
from exfm_ray.config.root import Config
from exfm_ray.das.student_data import StudentData
from exfm_ray.data.stream import EventStream
from exfm_ray.storage.atomic import read_json, short_hash
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.stores.supervision import SupervisionStore

FAILED_LIST = "parked.json"
"""The list of failed items. The name is what runs in progress have on disk."""


@dataclass(frozen=True)
class LabelingSpec:
    """Supervision of one stream by one teacher in one store: the unit that clients share.

    Attributes:
        stream_root: folder of the stream.
        snapshots: the teacher's snapshots.
        store: where the supervision is written.
        das: settings of the DAS.
        log: file of JSON lines with one line for each scored window (see docs/das.md).
        owns_snapshots: True removes snapshots that no window needs any more.
        readers: a folder for each reader of the supervision, in which the reader writes
            `windows=<n>/manifest.json` when it has learned n windows.
        role: name of this DAS in the log.
        labels: labels of the nodes that its actors run on.
        student_data: what students get beside predictions, None for nothing.
    """

    stream_root: AnyPath
    snapshots: SnapshotStore
    store: SupervisionStore
    das: DASConfig
    log: Path
    owns_snapshots: bool
    readers: tuple[Path, ...] = ()
    role: str = "das"
    labels: Mapping[str, str] = field(default_factory=dict)
    student_data: StudentData | None = None

    @classmethod
    def from_config(
        cls,
        config: Config,
        readers: Sequence[Path] = (),
        teacher: TeacherConfig | None = None,
    ) -> LabelingSpec:
        """Return the spec of a run, for its FM or for another teacher."""
        stores = config.stores
        name = teacher.name if teacher else config.fm.name
        is_other_runs = teacher is not None and teacher.run is not None
        return cls(
            stream_root=stores / "stream",
            snapshots=SnapshotStore.from_config(config, name),
            store=SupervisionStore(stores / "supervision", name),
            das=config.das,
            log=config.folder / "timeline.jsonl",
            owns_snapshots=not config.das.keep_snapshots and not is_other_runs,
            readers=tuple(readers) if config.das.max_windows_ahead else (),
            role=f"das-{name}" if teacher else "das",
            labels=config.placement.das,
            student_data=StudentData.from_config(config, name),
        )

    @property
    def policy(self) -> SnapshotPolicy:
        """Which snapshot scores which window."""
        return SnapshotPolicy.from_config(self.das)

    @property
    def failed_list(self) -> AnyPath:
        """The file that lists what has failed for good."""
        return self.store.root / self.store.teacher / FAILED_LIST

    @property
    def name(self) -> str:
        """The name of the service: equal for all clients of this supervision in this store."""
        root = self.store.root
        teacher = self.store.teacher
        digest = short_hash([str(root), teacher])
        return f"das {root.parent.name} {teacher} {digest}"

    def has(self, window: int) -> bool:
        """Return True if everything that is made for a window is committed."""
        if not self.store.has(window):
            return False
        return self.student_data is None or self.student_data.has(window)

    def first_difference(self, other: LabelingSpec) -> str | None:
        """Describe the first setting in which two specs differ.

        None if they are equal. Readers, log and role may differ.
        """
        for name in ("stream_root", "snapshots", "store", "das", "labels", "student_data"):
            value = getattr(self, name)
            other_value = getattr(other, name)
            if value != other_value:
                return f"{name}: {value} is not {other_value}"
        return None


def failed_items(spec: LabelingSpec) -> list[dict[str, Any]]:
    """Return the failed items whose windows are not committed yet, with the teacher's name.

    For the fields see `das.queue.FailedItem`.
    """
    path = spec.failed_list
    rows = read_json(path) if path.exists() else []
    pending = [row for row in rows if not spec.has(row["window"])]
    return [{"teacher": spec.store.teacher, **row} for row in pending]


def fallback_windows(spec: LabelingSpec) -> list[dict[str, Any]]:
    """Return the windows that an older snapshot has scored in place of a damaged one."""
    rows = []
    for window in EventStream.open(spec.stream_root).windows():
        if not spec.store.has(window):
            continue
        manifest = spec.store.manifest(window)
        if manifest.asked is not None:
            fields = {"teacher", "window", "asked", "snapshot"}
            rows.append(manifest.model_dump(include=fields))
    return rows
