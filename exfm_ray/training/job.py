"""A training job: whose models it trains, what it reads, how far it is.

The code that its workers run is in `worker`, which takes seconds to import.
"""

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
from exfm_ray.stores.user_history import history_store, with_history
from exfm_ray.training.checkpoint import Checkpoints, Cursor
from exfm_ray.training.static import EarlyStopping, StaticSet


@dataclass(frozen=True)
class Job:
    """The training of the FM (`students` empty), or of vertical models in all arms of the config.

    Attributes:
        name: names its checkpoints, logs and rows of the timeline.
        students: the vertical models that it trains.
    """

    name: str
    config: Config
    students: tuple[StudentConfig, ...] = ()

    @property
    def role(self) -> str:
        """The role of the job, `fm` or `vm`."""
        return "vm" if self.students else "fm"

    @property
    def trainer(self) -> TrainerConfig:
        """The training settings of this job."""
        return self.config.vm if self.students else self.config.fm

    def trainer_for(self, arm: Arm | None) -> TrainerConfig:
        """The training settings of one arm, or of the FM (None).

        Tables that take the teacher's rows have a learning rate of their own.
        """
        if arm is None or not arm.shares_tables:
            return self.trainer
        optimizer = self.trainer.optimizer.model_copy(
            update={"table_lr": self.config.distillation.share.table_lr}
        )
        return self.trainer.model_copy(update={"optimizer": optimizer})

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the nodes that its workers run on."""
        return self.config.placement.vm if self.students else self.config.placement.fm

    @property
    def stream_root(self) -> AnyPath:
        """The folder of the stream."""
        return self.config.stores / "stream"

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of the job."""
        return Checkpoints(self.config.folder / "checkpoints" / self.name)

    def tasks(self) -> tuple[str, ...]:
        """Tasks whose supervision the students read."""
        names: dict[str, None] = {}
        for student in self.students:
            names |= dict.fromkeys(student.tasks)
        return tuple(names)

    @property
    def teacher(self) -> str:
        """The teacher of all students."""
        teachers = [student.teacher for student in self.students if student.teacher]
        return teachers[0] if teachers else self.config.fm.name

    def reader(self, schema: Schema) -> FragmentReader:
        """The reader that the feed uses for this job."""
        config = self.config
        if config.fm.static:
            return ShuffledReader(self.stream_root, seed=config.seed)
        if not self.students:
            return StreamReader(self.stream_root, fm_tasks(config, schema))

        supervision = None
        if any(arm.uses_supervision for arm in config.vm.arms):
            supervision = SupervisionStore(config.stores / "supervision", self.teacher)
        domains = {schema.domain_index(student.domain) for student in self.students}
        return AugmentedReader(
            self.stream_root,
            supervision,
            SnapshotPolicy.from_config(config.das),
            tuple(sorted(domains)),
            self.tasks(),
            shared_store(config, self.teacher),
            history_store(config),
        )

    def static(self, windows: Sequence[int]) -> StaticSet | None:
        """The windows as a static set; None if they are a stream."""
        return StaticSet(self.config.fm.static, tuple(windows)) if self.config.fm.static else None

    def passes(self, windows: Sequence[int], done: Cursor) -> list[WindowPass]:
        """The passes that remain after `done`, in order.

        In a stream each window is evaluated, then learned. Over a static set each pass learns the
        training windows, then evaluates the others.
        """
        static = self.static(windows)
        passes: list[WindowPass] = []
        if static:
            for number in range(done.windows + 1, static.config.passes + 1):
                passes += static.passes(number)
        else:
            for window in windows[done.windows :]:
                passes += [WindowPass(window, "evaluate"), WindowPass(window, "learn")]
        return passes[done.passes :]

    def superseded(self, best: int) -> list[int]:
        """Published passes over a static set that are not the best one; a kill may leave one."""
        versions = SnapshotStore.from_config(self.config).versions()
        return [version for version in versions if version != best]

    def finished(self, windows: Sequence[int]) -> bool:
        """True if nothing is left to do."""
        if not self.config.fm.static:
            return self.checkpoints.latest().windows >= len(windows)
        state = self.checkpoints.stopping()
        if not state:
            return False
        stopping = EarlyStopping.restore(self.config.fm.static, state)
        return stopping.over and not self.superseded(stopping.best)


def fm_tasks(config: Config, schema: Schema) -> tuple[str, ...]:
    """Tasks that the FM learns."""
    return config.fm.tasks or schema.tasks


def arm_schema(
    arm: Arm | None,
    schema: Schema,
    config: Config,
) -> Schema:
    """The schema of the examples that an arm reads."""
    return with_history(schema, config.distillation.history) if arm and arm.uses_history else schema
