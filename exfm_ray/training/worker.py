"""What the workers of a training job run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from exfm_ray.config.arms import Arm, Objective
from exfm_ray.config.models import ModelConfig
from exfm_ray.data.feed import FeedClient
from exfm_ray.data.readers import WindowPass
from exfm_ray.data.stream import EventStream
from exfm_ray.distillation.adapter import Adapter
from exfm_ray.distillation.objective import Weights
from exfm_ray.distillation.student import Student
from exfm_ray.engine.engine import Engine
from exfm_ray.engine.replica import ReplicatedModule
from exfm_ray.models.network import build_network
from exfm_ray.schema import Schema
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.training.async_checkpoint import AsyncCheckpointer
from exfm_ray.training.checkpoint import BEGINNING, Cursor
from exfm_ray.training.group import BatchGroup
from exfm_ray.training.job import Job, arm_schema, fm_tasks
from exfm_ray.training.loop import Loop, LoopProgress, Report
from exfm_ray.training.model_trainer import ModelTrainer
from exfm_ray.training.nan_check import FiniteCheck
from exfm_ray.training.publisher import ModelPublisher
from exfm_ray.training.static import EarlyStopping, StaticSet
from exfm_ray.training.table_sharing import TableSharing


def build_groups(
    job: Job,
    schema: Schema,
    device: torch.device,
) -> list[BatchGroup]:
    """The trainers of a job.

    Returns:
        For the FM, one group of one trainer over all domains. Else a group for each student, with
        a trainer for each arm.
    """
    config = job.config
    if job.role == "fm":
        tasks = tuple(schema.task_index(task) for task in fm_tasks(config, schema))
        trainer = _trainer(job, config.fm.name, config.fm.model, None, tasks, schema, device)
        group = BatchGroup(
            schema,
            [trainer],
            None,
            config.fm.batch_size,
            device,
            evict_after_windows=config.fm.evict_after_windows,
        )
        return [group]

    groups = []
    for student in job.students:
        tasks = tuple(schema.task_index(task) for task in student.tasks)
        network = student.model or config.vm.model
        trainers = [
            _trainer(job, student.name, network, arm, tasks, schema, device)
            for arm in config.vm.arms
        ]
        group = BatchGroup(
            schema,
            trainers,
            schema.domain_index(student.domain),
            config.vm.batch_size,
            device,
            teacher_columns=tuple(job.tasks().index(task) for task in student.tasks),
            teacher_tasks=len(job.tasks()),
            evict_after_windows=config.vm.evict_after_windows,
            sharing=TableSharing.from_config(config, student, schema),
        )
        groups.append(group)
    return groups


def _trainer(
    job: Job,
    model: str,
    network: ModelConfig,
    arm: Arm | None,
    tasks: tuple[int, ...],
    schema: Schema,
    device: torch.device,
) -> ModelTrainer:
    """Build a trainer. All arms of a student start from the same tables and serving network."""
    seed = job.config.seed
    distillation = job.config.distillation
    schema = arm_schema(arm, schema, job.config)
    student = Student(
        build_network(network, schema, len(tasks), seed),
        arm.objective if arm else Objective.LABELS,
        distillation,
        seed,
    )
    adapter = None
    if arm and arm.objective is Objective.AH_SA:
        module = Adapter(distillation.sa, len(tasks), seed)
        adapter = ReplicatedModule(module, distillation.sa.lr, device)
    return ModelTrainer(
        model,
        arm,
        tasks,
        Engine(schema, job.trainer_for(arm), student, network, seed, device),
        Weights.from_config(distillation),
        adapter,
    )


@dataclass
class Worker:
    """One worker of a job.

    Attributes:
        feed: the feed actor of the job.
        report: where figures go (rank 0).
        loop: runs the job's groups over windows.
        saver: writes checkpoints.
        finite_check: stops the job at a loss or a weight that is not finite.
        publisher: stores snapshots and exported models.
    """

    job: Job
    feed: Any
    report: Report | None
    device: torch.device
    loop: Loop = field(init=False)
    saver: AsyncCheckpointer = field(init=False)
    finite_check: FiniteCheck = field(init=False)
    publisher: ModelPublisher = field(init=False)
    _stopping: EarlyStopping | None = field(default=None, init=False)
    _windows: int = field(default=0, init=False)
    _saved_examples: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        config = self.job.config
        stream = EventStream.open(self.job.stream_root)
        torch.manual_seed(config.seed)
        self.loop = Loop(
            role=self.job.role,
            seed=config.seed,
            groups=build_groups(self.job, stream.schema, self.device),
            reader=self.job.reader(stream.schema),
            client=FeedClient(self.feed, dist.get_rank()),
            report=self.report,
            policy=SnapshotPolicy.from_config(config.das),
            warmup_windows=config.metrics.warmup_windows,
        )
        self.saver = AsyncCheckpointer(self.job.checkpoints, config.checkpoint.keep)
        self.finite_check = FiniteCheck(self.loop, self.job.checkpoints, self.job.role)
        self.publisher = ModelPublisher(self.job, self.loop, stream.schema, self.finite_check)

    def run(self, windows: Sequence[int], done: Cursor) -> None:
        """Train on `windows` from a checkpoint at `done`, or from `BEGINNING`."""
        if done != BEGINNING:
            self.job.checkpoints.load(done, self.loop)
        self._windows = done.windows
        self._saved_examples = done.examples
        self.loop.on_batch_end = self._on_batch_end
        self.loop.report_guard = lambda: self.job.checkpoints.writing(
            f"{self.job.config.folder / 'metrics.jsonl'}, or timeline.jsonl beside it,"
        )

        static = self.job.static(windows)
        if static:
            self.run_static(static)
        else:
            self.run_stream(windows, done.windows)
        self.saver.finish()

    def run_stream(self, windows: Sequence[int], first: int) -> None:
        """Train on one window after the other, from position `first` on.

        What a window produces is on disk before its checkpoint says that the window is done.

        The state is staged before the export, which writes the newest rows of the teacher into
        arms with +share. When more windows arrive later, the job resumes without those rows.
        """
        for position in range(first, len(windows)):
            window = windows[position]
            self.loop.run(window)
            self.finite_check.check()
            self.saver.stage(self.loop)
            self.publisher.publish(window + 1)
            done = position + 1
            if self.job.role == "vm" and done == len(windows):
                self.publisher.export(done)
            self._save_window(done, window)

    def run_static(self, static: StaticSet) -> None:
        """Make passes over a static set until early stopping; publish the best state only."""
        state = self.job.checkpoints.stopping()
        self._stopping = EarlyStopping(static.config)
        if state:
            self._stopping = EarlyStopping.restore(static.config, state)
        self._remove_superseded()

        while not self._stopping.over:
            number = self._stopping.last + 1
            previous_best = self._stopping.best
            rows = self.loop.run_passes(static.passes(number), number)
            self.finite_check.check()
            is_best = self._update_stopping(static, rows)
            if is_best:
                self.publisher.publish(number)
            self._save_window(number)
            if is_best and previous_best:
                self.saver.finish()
                self._remove_superseded()

    def _update_stopping(self, static: StaticSet, rows: Sequence[dict[str, Any]]) -> bool:
        """Take in the figures of a pass, which only rank 0 has; True if it is the best so far."""
        assert self._stopping
        is_best = False
        if dist.get_rank() == 0:
            is_best = self._stopping.take(rows)
        decision: list[Any] = [is_best, self._stopping.state()]
        dist.broadcast_object_list(decision)
        is_best, state = decision
        self._stopping = EarlyStopping.restore(static.config, state)
        return bool(is_best)

    def _remove_superseded(self) -> None:
        """Remove published passes that are not the best one."""
        assert self._stopping
        if dist.get_rank() == 0:
            snapshots = SnapshotStore.from_config(self.job.config)
            for version in self.job.superseded(self._stopping.best):
                snapshots.remove(version)

    def _on_batch_end(
        self,
        window_pass: WindowPass,
        progress: LoopProgress,
        group: int,
    ) -> None:
        """Check the losses after a batch and save a checkpoint if one is due."""
        self.finite_check.observe(window_pass.window, progress.batches - 1, group)
        every_examples = self.job.config.checkpoint.every_examples
        examples = progress.examples
        if every_examples and examples - self._saved_examples >= every_examples:
            self.loop.stop_clock(window_pass, progress)
            self.finite_check.check()
            self._save(Cursor(self._windows, examples, progress.work), window_pass.window)
            self._saved_examples = examples
            self.loop.start_clock()

    def _save_window(self, windows: int, window: int | None = None) -> None:
        """Save a checkpoint at the end of a window, or of a pass."""
        self._save(Cursor(windows), window)
        self._windows = windows
        self._saved_examples = 0

    def _save(self, cursor: Cursor, window: int | None) -> None:
        teacher = None
        if self.job.role == "vm" and window is not None:
            policy = SnapshotPolicy.from_config(self.job.config.das)
            teacher = policy.version(window)
        stopping = self._stopping.state() if self._stopping else None
        self.saver.save(cursor, self.loop, teacher, stopping)
