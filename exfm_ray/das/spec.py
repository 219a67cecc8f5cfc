"""What a DAS is to do: which stream it labels, by which teacher, and how."""

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
from exfm_ray.storage.paths import store_root_of_run
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.stores.supervision import SupervisionStore


@dataclass(frozen=True)
class LabelingSpec:
    """Supervision of one stream by one teacher into one store: the unit that clients share.

    Attributes:
        log: file of JSON lines; one is added for each window that was scored (see docs/das.md).
        owns_snapshots: snapshots that no window needs any more are removed.
        role: what the log calls this DAS.
        labels: of the nodes that its actors run on.
        gifts: what the windows' students are given beside predictions; None: nothing.
        readers: folders in which each reader of the supervision leaves `windows=<n>/manifest.json`
            when it has learnt n windows.
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
    gifts: StudentData | None = None

    @classmethod
    def from_config(
        cls,
        config: Config,
        readers: Sequence[Path] = (),
        teacher: TeacherConfig | None = None,
    ) -> LabelingSpec:
        """The order of a run: by its FM, or by another teacher."""
        stores = config.stores
        name = teacher.name if teacher else config.fm.name
        elsewhere = store_root_of_run(teacher.run) if teacher and teacher.run else None
        return cls(
            stream_root=stores / "stream",
            snapshots=SnapshotStore.from_config(config, name),
            store=SupervisionStore(stores / "supervision", name),
            das=config.das,
            log=config.folder / "timeline.jsonl",
            owns_snapshots=not config.das.keep_snapshots and elsewhere is None,
            readers=tuple(readers) if config.das.max_windows_ahead else (),
            role=f"das-{name}" if teacher else "das",
            labels=config.placement.das,
            gifts=StudentData.from_config(config, name),
        )

    @property
    def policy(self) -> SnapshotPolicy:
        """Which snapshot scores which window."""
        return SnapshotPolicy.from_config(self.das)

    @property
    def failed_list(self) -> AnyPath:
        """Where what has failed too often is listed."""
        return self.store.root / self.store.teacher / "parked.json"

    @property
    def name(self) -> str:
        """Names the service that carries the order out: the same for all who want this supervision
        in this store."""
        return f"das {self.store.root.parent.name} {self.store.teacher} {short_hash([str(self.store.root), self.store.teacher])}"

    def has(self, window: int) -> bool:
        """True when all that is to be made of a window is committed."""
        return self.store.has(window) and (self.gifts is None or self.gifts.has(window))

    def first_difference(self, other: LabelingSpec) -> str | None:
        """The first thing in which two orders differ; None where they are the same but for who
        reads."""
        for name in ("stream_root", "snapshots", "store", "das", "labels", "gifts"):
            if getattr(self, name) != getattr(other, name):
                return f"{name}: {getattr(self, name)} is not {getattr(other, name)}"
        return None


def failed_items(order: LabelingSpec) -> list[dict[str, Any]]:
    """What has failed too often and is not done, see `backlog.FailedItem`; with the teacher's
    name."""
    rows = read_json(order.failed_list) if order.failed_list.exists() else []
    return [{"teacher": order.store.teacher, **row} for row in rows if not order.has(row["window"])]


def fallback_windows(order: LabelingSpec) -> list[dict[str, Any]]:
    """The windows that an older snapshot has scored, in the place of one that is left out."""
    done = [
        order.store.manifest(window)
        for window in EventStream.open(order.stream_root).windows()
        if order.store.has(window)
    ]
    return [
        m.model_dump(include={"teacher", "window", "asked", "snapshot"})
        for m in done
        if m.asked is not None
    ]
