"""What the DAS gives a run's vertical models beside predictions, where their arms ask for it: rows
of tables, representations."""

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
    """Published with a window's supervision, by the same snapshot.

    Attributes:
        domains: whose examples' rows are given: those of the teacher's students.
        tables: of which rows are given; none: all tables.
        seed: of the representations' projection.
    """

    shared: SharedStore | None
    history: HistoryStore | None
    domains: tuple[str, ...]
    tables: tuple[str, ...]
    seed: int
    policy: SnapshotPolicy

    @classmethod
    def from_config(cls, config: Config, teacher: str | None = None) -> Self:
        """What the arms of a config ask of the FM, or of another teacher. Histories are the FM's,
        whoever teaches."""
        name = teacher or config.fm.name
        domains = tuple(
            sorted(
                {
                    student.domain
                    for student in config.vm.models
                    if (student.teacher or config.fm.name) == name
                }
            )
        )
        shared = shared_store(config, name) if domains else None
        history = history_store(config) if name == config.fm.name else None
        return cls(
            shared,
            history,
            domains,
            config.distillation.share.tables,
            config.seed,
            SnapshotPolicy.from_config(config.das),
        )

    def has(self, window: int) -> bool:
        """True when all that is given with a window is committed."""
        return all(store.has(window) for store in (self.shared, self.history) if store)

    def ready(self, window: int) -> bool:
        """True when a window's gifts can be made: histories are made in order."""
        return self.history is None or self.history.ready(window)

    def extra_versions(self, windows: Sequence[int], learnt: int) -> list[int]:
        """Versions that must stay beside those that supervise these windows, while the teacher has
        learnt so many.

        An aligned history is mapped out of the space of an earlier one. A model with shared rows is
        stored with those of the snapshot for the next window; students learn as many windows as
        their teacher at least, but of a followed stream the DAS goes further: it scores windows
        whose labels are still to come.
        """
        spaces = [self.history.space_before(window) for window in windows] if self.history else []
        served = [self.policy.version(learnt)] if self.shared else []
        return [version for version in (*spaces, *served) if version is not None]

    def publish(
        self,
        stream: EventStream,
        snapshots: SnapshotStore,
        window: Window,
        version: int,
    ) -> None:
        """Make what is not there yet."""
        if self.shared and not self.shared.has(window.index):
            self.shared.publish(
                stream, window, snapshots, version, self.domains, self.tables, self.policy
            )
        if self.history and not self.history.has(window.index):
            self.history.publish(stream, window, snapshots, version, self.seed)
