"""A training job: whose models it trains, what it reads, how far it is. What its workers run is in
`worker`, which imports seconds of engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exfm_ray.config.arms import Arm
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig, TrainerConfig
from exfm_ray.data.readers import FragmentReader, ShuffledReader, StreamReader, WindowPass
from exfm_ray.schema import Schema
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.readers import AugmentedReader
from exfm_ray.stores.shared_rows import shared_store
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.stores.supervision import SupervisionStore
from exfm_ray.stores.user_history import history_store
from exfm_ray.training.checkpoint import Checkpoints, Cursor
from exfm_ray.training.static import EarlyStopping, StaticSet


@dataclass(frozen=True)
class Job:
    """The FM's training (`students` empty) or that of some vertical models, in all arms of the
    config."""

    name: str
    config: Config
    students: tuple[StudentConfig, ...] = ()

    @property
    def role(self) -> str:
        """fm or vm."""
        return "vm" if self.students else "fm"

    @property
    def trainer(self) -> TrainerConfig:
        """Settings of this job's training."""
        return self.config.vm if self.students else self.config.fm

    def trainer_for(self, arm: Arm | None) -> TrainerConfig:
        """The same of one arm (None: the FM): tables that are given rows have a rate of their
        own."""
        if arm is None or not arm.shares_tables:
            return self.trainer
        optimizer = self.trainer.optimizer.model_copy(
            update={"table_lr": self.config.distillation.share.table_lr}
        )
        return self.trainer.model_copy(update={"optimizer": optimizer})

    @property
    def labels(self) -> dict[str, str]:
        """Of the nodes that its workers run on."""
        return self.config.placement.vm if self.students else self.config.placement.fm

    @property
    def stream_root(self) -> AnyPath:
        """Where the stream lies."""
        return self.config.stores / "stream"

    @property
    def checkpoints(self) -> Checkpoints:
        """The job's checkpoints."""
        return Checkpoints(self.config.folder / "checkpoints" / self.name)

    def tasks(self) -> tuple[str, ...]:
        """Tasks whose supervision the students read."""
        return tuple(dict.fromkeys(task for student in self.students for task in student.tasks))

    @property
    def teacher(self) -> str:
        """Whose supervision the students read: the same for all of them."""
        return next(
            (student.teacher for student in self.students if student.teacher), self.config.fm.name
        )

    def reader(self, schema: Schema) -> FragmentReader:
        """What the feed reads for this job."""
        if self.config.fm.static:
            return ShuffledReader(self.stream_root, seed=self.config.seed)
        if not self.students:
            return StreamReader(self.stream_root, fm_tasks(self.config, schema))
        taught = any(arm.uses_supervision for arm in self.config.vm.arms)
        store = (
            SupervisionStore(self.config.stores / "supervision", self.teacher) if taught else None
        )
        domains = tuple(sorted({schema.domain_index(student.domain) for student in self.students}))
        given = shared_store(self.config, self.teacher), history_store(self.config)
        return AugmentedReader(
            self.stream_root,
            store,
            SnapshotPolicy.from_config(self.config.das),
            domains,
            self.tasks(),
            *given,
        )

    def static(self, windows: Sequence[int]) -> StaticSet | None:
        """The windows as a static set, where the config says so."""
        return StaticSet(self.config.fm.static, tuple(windows)) if self.config.fm.static else None

    def passes(self, windows: Sequence[int], done: Cursor) -> list[WindowPass]:
        """What is read, in order, from a mark on: each window to evaluate, then to learn; over a
        static set, each pass."""
        static = self.static(windows)
        if static:
            works = [
                work
                for number in range(done.windows + 1, static.config.passes + 1)
                for work in static.passes(number)
            ]
        else:
            works = [
                work
                for window in windows[done.windows :]
                for work in (WindowPass(window, "evaluate"), WindowPass(window, "learn"))
            ]
        return works[done.work :]

    def superseded(self, best: int) -> list[int]:
        """Published passes over a static set that are not the best one: a kill may leave one
        behind."""
        return [
            version
            for version in SnapshotStore.from_config(self.config).versions()
            if version != best
        ]

    def finished(self, windows: Sequence[int]) -> bool:
        """True when nothing is left to do."""
        if self.config.fm.static:
            before = self.checkpoints.stopping()
            stopping = EarlyStopping.restore(self.config.fm.static, before) if before else None
            return stopping is not None and stopping.over and not self.superseded(stopping.best)
        return self.checkpoints.latest().windows >= len(windows)


def fm_tasks(config: Config, schema: Schema) -> tuple[str, ...]:
    """Tasks that the FM learns."""
    return config.fm.tasks or schema.tasks
