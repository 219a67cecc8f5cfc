"""What the workers of a training job run: which lanes they hold, what they do after a window and at
the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from exfm_ray.config.arms import Arm, Objective
from exfm_ray.config.models import ModelConfig
from exfm_ray.config.root import Config
from exfm_ray.data.feed import FEED_WAIT_S, FeedClient
from exfm_ray.data.readers import WindowPass
from exfm_ray.data.stream import EventStream
from exfm_ray.distillation.adapter import Adapter
from exfm_ray.distillation.objective import Weights
from exfm_ray.distillation.student import Student
from exfm_ray.engine.engine import Engine
from exfm_ray.engine.replica import ReplicatedModule
from exfm_ray.errors import UserError
from exfm_ray.models.network import build_network
from exfm_ray.models.serialization import MOMENTUM, commit_model, remove_model, write_tables
from exfm_ray.models.user_features import UserFeatures
from exfm_ray.schema import Schema
from exfm_ray.storage.remote import AnyPath, poll_interval
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.stores.user_history import history_store, key_column, with_history
from exfm_ray.training.async_checkpoint import AsyncCheckpointer
from exfm_ray.training.checkpoint import BEGINNING, Cursor
from exfm_ray.training.group import BatchGroup
from exfm_ray.training.job import Job, fm_tasks
from exfm_ray.training.loop import Loop, LoopProgress, Report
from exfm_ray.training.model_trainer import ModelTrainer
from exfm_ray.training.nan_check import FiniteCheck
from exfm_ray.training.static import EarlyStopping, StaticSet
from exfm_ray.training.table_sharing import TableSharing

POLL_S = 0.2


def build_groups(
    job: Job,
    schema: Schema,
    device: torch.device,
) -> list[BatchGroup]:
    """The job's lanes: one for the FM over all domains; else a group for each student, with a lane
    for each arm."""
    config = job.config
    if job.role == "fm":
        tasks = tuple(schema.task_index(task) for task in fm_tasks(config, schema))
        lane = _lane(job, config.fm.name, config.fm.model, None, tasks, schema, device)
        return [
            BatchGroup(
                schema,
                [lane],
                None,
                config.fm.batch_size,
                device,
                evict_after_windows=config.fm.evict_after_windows,
            )
        ]
    groups = []
    for student in job.students:
        tasks = tuple(schema.task_index(task) for task in student.tasks)
        network = student.model or config.vm.model
        lanes = [
            _lane(job, student.name, network, arm, tasks, schema, device) for arm in config.vm.arms
        ]
        teacher = tuple(job.tasks().index(task) for task in student.tasks)
        domain = schema.domain_index(student.domain)
        trainer = config.vm
        sharing = TableSharing.from_config(config, student, schema)
        groups.append(
            BatchGroup(
                schema,
                lanes,
                domain,
                trainer.batch_size,
                device,
                teacher,
                len(job.tasks()),
                trainer.evict_after_windows,
                sharing,
            )
        )
    return groups


def arm_schema(
    arm: Arm | None,
    schema: Schema,
    config: Config,
) -> Schema:
    """What an arm reads of an example."""
    return with_history(schema, config.distillation.history) if arm and arm.uses_history else schema


def _lane(
    job: Job,
    model: str,
    network: ModelConfig,
    arm: Arm | None,
    tasks: tuple[int, ...],
    schema: Schema,
    device: torch.device,
) -> ModelTrainer:
    """All arms of a student start from the same tables and the same serving network."""
    seed = job.config.seed
    distillation = job.config.distillation
    schema = arm_schema(arm, schema, job.config)
    student = Student(
        build_network(network, schema, len(tasks), seed),
        arm.objective if arm else Objective.LABELS,
        distillation,
        seed,
    )
    adapter = (
        ReplicatedModule(Adapter(distillation.sa, len(tasks), seed), distillation.sa.lr, device)
        if arm and arm.objective is Objective.AH_SA
        else None
    )
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
    """One worker of a job."""

    job: Job
    feed: Any
    report: Report | None
    device: torch.device
    loop: Loop = field(init=False)
    saver: AsyncCheckpointer = field(init=False)
    _stopping: EarlyStopping | None = field(default=None, init=False)
    _windows: int = field(default=0, init=False)
    _saved: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        config = self.job.config
        self.stream = EventStream.open(self.job.stream_root)
        torch.manual_seed(config.seed)
        groups = build_groups(self.job, self.stream.schema, self.device)
        self.saver = AsyncCheckpointer(self.job.checkpoints, config.checkpoint.keep)
        self.loop = Loop(
            role=self.job.role,
            seed=config.seed,
            groups=groups,
            reader=self.job.reader(self.stream.schema),
            client=FeedClient(self.feed, dist.get_rank()),
            report=self.report,
            policy=SnapshotPolicy.from_config(config.das),
            warmup_windows=config.metrics.warmup_windows,
        )

    def run(self, windows: Sequence[int], done: Cursor) -> None:
        """Go on from a checkpoint's mark, or from `BEGINNING`."""
        if done != BEGINNING:
            self.job.checkpoints.load(done, self.loop)
        self._windows = done.windows
        self._saved = done.examples
        self.loop.on_batch_end = self._between
        self.loop.report_guard = lambda: self.job.checkpoints.writing(
            f"{self.job.config.folder / 'metrics.jsonl'}, or timeline.jsonl beside it,"
        )
        self._watch = FiniteCheck(self.loop, self.job.checkpoints, self.job.role)
        static = self.job.static(windows)
        if static:
            self.run_static(static)
        else:
            self.run_stream(windows, done.windows)
        self.saver.finish()

    def run_stream(self, windows: Sequence[int], done: int) -> None:
        """One window after the other. What a window leaves behind is there before its checkpoint
        says that it is done.

        The checkpoint's state is that before the export, which gives arms with +share rows to be
        served with: a job that goes on when more windows are there must not find them.
        """
        for position, window in list(enumerate(windows))[done:]:
            self.loop.run(window)
            self._watch.check()
            self.saver.stage(self.loop)
            self.publish(window + 1)
            if self.job.role == "vm" and position + 1 == len(windows):
                self.export(len(windows))
            self._save_window(position + 1, window)

    def run_static(self, static: StaticSet) -> None:
        """Passes over a static set until early stopping; the best one's state is published, and
        only that."""
        before = self.job.checkpoints.stopping()
        self._stopping = (
            EarlyStopping.restore(static.config, before) if before else EarlyStopping(static.config)
        )
        self._remove_beaten()
        while not self._stopping.over:
            number = self._stopping.last + 1
            worse = self._stopping.best
            rows = self.loop.run_passes(static.passes(number), number)
            self._watch.check()
            decided: list[Any] = [
                self._stopping.take(rows) if dist.get_rank() == 0 else None,
                self._stopping.state(),
            ]
            dist.broadcast_object_list(decided)  # only rank 0 knows the figures
            better = decided[0]
            self._stopping = EarlyStopping.restore(static.config, decided[1])
            if better:
                self.publish(number)
            self._save_window(number)
            if better and worse:
                self.saver.finish()
                self._remove_beaten()

    def _remove_beaten(self) -> None:
        assert self._stopping
        if dist.get_rank() == 0:
            for version in self.job.superseded(self._stopping.best):
                self._snapshots(self.job.config.fm.name).remove(version)

    def _between(
        self,
        work: WindowPass,
        under: LoopProgress,
        group: int,
    ) -> None:
        """After a batch: a checkpoint, where it is time for one."""
        self._watch.observe(work.window, under.batches - 1, group)
        every = self.job.config.checkpoint.every_examples
        examples = sum(under.learnt)
        if every and examples - self._saved >= every:
            self.loop.stop_clock(work, under)
            self._watch.check()
            self._save(Cursor(self._windows, examples, under.work), work.window)
            self._saved = examples
            self.loop.start_clock()

    def _save_window(self, windows: int, window: int | None = None) -> None:
        """A checkpoint at the end of a window, or of a pass."""
        self._save(Cursor(windows), window)
        self._windows = windows
        self._saved = 0

    def _save(self, mark: Cursor, window: int | None) -> None:
        teacher = (
            SnapshotPolicy.from_config(self.job.config.das).version(window)
            if self.job.role == "vm" and window is not None
            else None
        )
        self.saver.save(
            mark, self.loop, teacher, self._stopping.state() if self._stopping else None
        )

    def _snapshots(self, teacher: str) -> SnapshotStore:
        return SnapshotStore(self.job.config.stores / "snapshots", teacher)

    def publish(self, version: int) -> None:
        """Publish a snapshot of the FM, or of each student that is a teacher itself: the state
        after the first `version` windows, or after pass `version` over a static set."""
        config = self.job.config
        teachers: dict[tuple[str, Arm | None], ModelConfig] = {
            (student.name, student.published_arm): student.model or config.vm.model
            for student in self.job.students
            if student.published_arm
        }
        for lane in self.loop.lanes:
            network = (
                config.fm.model if self.job.role == "fm" else teachers.get((lane.model, lane.arm))
            )
            if network:
                facts = {"teacher": lane.model, "version": version, "seed": config.seed}
                folder = self._snapshots(lane.model).folder(version)
                when = f"pass {version}" if self._stopping else f"window {version - 1}"
                self._store(
                    folder,
                    lane,
                    network,
                    facts,
                    when,
                    momentum=any(arm.shares_tables for arm in config.arms),
                )

    def export(self, windows: int) -> None:
        """Export each VM as it is served: tables, network and serving head; no auxiliary head, no
        adapter.

        An arm with +share is evaluated with rows that it is given just before, so it is given all
        that are known now; one with +history is stored with what it reads of each user.
        """
        config = self.job.config
        if any(arm.shares_tables for arm in config.vm.arms):
            snapshots = SnapshotStore.from_config(config, self.job.teacher)
            version = SnapshotPolicy.from_config(config.das).version(windows)
            if version is not None:
                _await(
                    lambda: snapshots.has(version),
                    snapshots.root,
                    f"{snapshots.folder(version)}: not published",
                    "train its teacher further",
                )
        for group in self.loop.groups:
            group.refresh(windows)
        networks = {student.name: student.model or config.vm.model for student in self.job.students}
        for lane in self.loop.lanes:
            folder = config.folder / "exported" / lane.name
            facts = {
                "vm": lane.model,
                "arm": str(lane.arm),
                "windows": windows,
                "seed": config.seed,
            }
            past = None
            if lane.uses_history:
                past, facts["history"] = self._past(windows)
            self._store(
                folder, lane, networks[lane.model], facts, f"window {windows - 1}", past=past
            )

    def _past(self, windows: int) -> tuple[UserFeatures, dict[str, Any]]:
        """What an arm with +history reads of each user after so many windows; what is to be said of
        it."""
        history = history_store(self.job.config)
        schema = self.stream.schema
        assert history
        _await(
            lambda: history.ready(windows),
            history.root,
            f"{history.folder(windows - 1)}: not represented",
            "run the DAS",
        )
        past = history.state_before(windows, schema).to_user_features()
        return past, {
            "key": schema.single[key_column(schema, history.settings)].name,
            "inputs": past.inputs_UF.shape[1],
        }

    def _store(
        self,
        folder: AnyPath,
        lane: ModelTrainer,
        network: ModelConfig,
        facts: dict[str, Any],
        when: str,
        momentum: bool = False,
        past: UserFeatures | None = None,
    ) -> None:
        """Store a lane's model in the place of what the folder holds. UserError where a weight is
        not finite: then that stays."""
        rank = dist.get_rank()
        written = self.job.checkpoints.writing(f"{folder}: the model after {when}")
        with lane.engine.ema_weights(), written:
            tables = lane.engine.table_shards()
            dense = lane.engine.dense_state()
            moments = lane.engine.momentum_shards() if momentum else {}
            self._watch.check_weights(
                when,
                lane.name,
                {
                    **tables,
                    **dense,
                    **{f"momentum of {name}": tensor for name, tensor in moments.items()},
                },
            )
            if rank == 0:
                remove_model(folder)
            dist.barrier()
            write_tables(folder, rank, tables)
            if momentum:
                write_tables(folder, rank, moments, MOMENTUM)
            dist.barrier()
            if rank == 0:
                if past:
                    assert isinstance(folder, Path)
                    past.write(folder)
                serving = {
                    name.removeprefix("network."): tensor
                    for name, tensor in dense.items()
                    if name.startswith("network.")
                }
                tasks = tuple(self.stream.schema.tasks[task] for task in lane.tasks)
                commit_model(
                    folder,
                    network,
                    arm_schema(lane.arm, self.stream.schema, self.job.config),
                    tasks,
                    serving,
                    facts,
                )
            dist.barrier()


def _await(
    done: Callable[[], bool],
    root: AnyPath,
    lacking: str,
    remedy: str,
) -> None:
    """Wait for what another role of the run leaves below `root`; UserError where it does not
    come."""
    deadline = time.monotonic() + FEED_WAIT_S
    while not done():
        if time.monotonic() > deadline:
            raise UserError(f"{lacking} within {FEED_WAIT_S:.0f} s; {remedy}")
        time.sleep(poll_interval(root, POLL_S))
