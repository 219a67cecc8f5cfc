"""What the DAS gives vertical models beside predictions: table rows and user histories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from exfm_ray.config.root import Config
from exfm_ray.data.stream import EventStream, Window
from exfm_ray.stores.shared_rows import SharedStore, shared_store
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.stores.user_history import HistoryStore, history_store


@dataclass(frozen=True)
class StudentData:
    """Data published together with a window's supervision, by the same snapshot.

    Attributes:
        shared: rows of the teacher's tables, None if no arm uses them.
        history: user histories, None if no arm uses them.
        domains: names of the domains whose examples' rows are published: those of the teacher's
            students.
        tables: names of the tables whose rows are published; empty for all tables.
        seed: seed of the representations' projection.
        policy: decides which windows have a teacher.
    """

    shared: SharedStore | None
    history: HistoryStore | None
    domains: tuple[str, ...]
    tables: tuple[str, ...]
    seed: int
    policy: SnapshotPolicy

    @classmethod
    def from_config(cls, config: Config, teacher: str | None = None) -> Self:
        """Return what the arms of a config need from the FM, or from another teacher.

        User histories come from the FM only.
        """
        fm = config.fm.name
        name = teacher or fm
        students = [model for model in config.vm.models if (model.teacher or fm) == name]
        domains = tuple(sorted({student.domain for student in students}))
        return cls(
            shared=shared_store(config, name) if domains else None,
            history=history_store(config) if name == fm else None,
            domains=domains,
            tables=config.distillation.share.tables,
            seed=config.seed,
            policy=SnapshotPolicy.from_config(config.das),
        )

    def has(self, window: int) -> bool:
        """Return True if all data of a window is committed."""
        stores = (self.shared, self.history)
        return all(store.has(window) for store in stores if store)

    def ready(self, window: int) -> bool:
        """Return True if a window's data can be made: user histories are made in order."""
        return self.history is None or self.history.ready(window)

    def extra_versions(self, windows: Sequence[int], learned: int) -> list[int]:
        """Return the snapshot versions to keep in addition to those that supervise `windows`.

        An aligned history is mapped out of the space of an earlier version. A model with shared
        rows is stored with the rows of the snapshot for its next window. Students learn at least
        as many windows as their teacher. In a stream that is followed, though, the DAS runs ahead:
        it scores windows whose labels are still to come.

        Args:
            windows: windows that are still to be scored.
            learned: number of windows that the teacher has learned.
        """
        versions = []
        if self.history:
            versions += [self.history.space_before(window) for window in windows]
        if self.shared:
            versions.append(self.policy.version(learned))
        return [version for version in versions if version is not None]

    def publish(
        self,
        stream: EventStream,
        snapshots: SnapshotStore,
        window: Window,
        version: int,
    ) -> None:
        """Make the data of a window that is not committed yet."""
        if self.shared and not self.shared.has(window.index):
            self.shared.publish(
                stream=stream,
                window=window,
                snapshots=snapshots,
                version=version,
                domains=self.domains,
                tables=self.tables,
                policy=self.policy,
            )
        if self.history and not self.history.has(window.index):
            self.history.publish(stream, window, snapshots, version, self.seed)
