"""Stores trained models: snapshots of teachers and exports of vertical models."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from exfm_ray.config.arms import Arm
from exfm_ray.config.models import ModelConfig
from exfm_ray.data.feed import FEED_WAIT_S
from exfm_ray.errors import UserError
from exfm_ray.models.serialization import MOMENTUM, commit_model, remove_model, write_tables
from exfm_ray.models.user_features import UserFeatures
from exfm_ray.schema import Schema
from exfm_ray.storage.remote import AnyPath, poll_interval
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.stores.user_history import history_store, key_column
from exfm_ray.training.job import Job, arm_schema
from exfm_ray.training.loop import Loop
from exfm_ray.training.model_trainer import ModelTrainer
from exfm_ray.training.nan_check import FiniteCheck

POLL_S = 0.2

Facts = dict[str, Any]
"""What a stored model's manifest says of its training."""


@dataclass
class ModelPublisher:
    """Stores the models of a job's trainers; all workers call its methods in step."""

    job: Job
    loop: Loop
    schema: Schema
    finite_check: FiniteCheck

    def publish(self, version: int) -> None:
        """Publish a snapshot of the FM, or of each student that is itself a teacher.

        Args:
            version: how many windows the models have learned, or the number of the pass over a
                static set.
        """
        config = self.job.config
        when = f"pass {version}" if config.fm.static else f"window {version - 1}"
        with_momentum = any(arm.shares_tables for arm in config.arms)
        teachers = self._published_networks()
        for trainer in self.loop.trainers:
            network = teachers.get((trainer.model, trainer.arm))
            if network is None:
                continue
            folder = SnapshotStore(config.stores / "snapshots", trainer.model).folder(version)
            facts = {"teacher": trainer.model, "version": version, "seed": config.seed}
            self._store(folder, trainer, network, facts, when, with_momentum)

    def _published_networks(self) -> dict[tuple[str, Arm | None], ModelConfig]:
        """Networks of the models that are published, by name and arm."""
        config = self.job.config
        if self.job.role == "fm":
            return {(config.fm.name, None): config.fm.model}
        return {
            (student.name, student.published_arm): student.model or config.vm.model
            for student in self.job.students
            if student.published_arm
        }

    def export(self, windows: int) -> None:
        """Export each vertical model as it is served: tables, network and serving head.

        Auxiliary heads and adapters are dropped. Arms with +share take all rows of the teacher
        that are known by now. Arms with +history are stored with the features of each user.

        Args:
            windows: how many windows the models have learned.
        """
        config = self.job.config
        if any(arm.shares_tables for arm in config.vm.arms):
            self._await_teacher(windows)
        for group in self.loop.groups:
            group.refresh(windows)

        networks = {student.name: student.model or config.vm.model for student in self.job.students}
        for trainer in self.loop.trainers:
            facts: Facts = {
                "vm": trainer.model,
                "arm": str(trainer.arm),
                "windows": windows,
                "seed": config.seed,
            }
            user_features = None
            if trainer.uses_history:
                user_features, facts["history"] = self._user_features(windows)
            self._store(
                config.folder / "exported" / trainer.name,
                trainer,
                networks[trainer.model],
                facts,
                f"window {windows - 1}",
                user_features=user_features,
            )

    def _await_teacher(self, windows: int) -> None:
        """Wait for the snapshot that supervises the window after the first `windows` ones."""
        config = self.job.config
        version = SnapshotPolicy.from_config(config.das).version(windows)
        if version is None:
            return
        snapshots = SnapshotStore.from_config(config, self.job.teacher)
        _wait_for(
            lambda: snapshots.has(version),
            snapshots.root,
            f"{snapshots.folder(version)}: not published",
            "train its teacher further",
        )

    def _user_features(self, windows: int) -> tuple[UserFeatures, Facts]:
        """What an arm with +history reads of each user after `windows` windows, and its facts."""
        history = history_store(self.job.config)
        assert history
        _wait_for(
            lambda: history.ready(windows),
            history.root,
            f"{history.folder(windows - 1)}: not represented",
            "run the DAS",
        )
        features = history.state_before(windows, self.schema).to_user_features()
        key = self.schema.single[key_column(self.schema, history.settings)]
        return features, {"key": key.name, "inputs": features.inputs_UF.shape[1]}

    def _store(
        self,
        folder: AnyPath,
        trainer: ModelTrainer,
        network: ModelConfig,
        facts: Facts,
        when: str,
        with_momentum: bool = False,
        user_features: UserFeatures | None = None,
    ) -> None:
        """Replace the content of `folder` by a trainer's model.

        Args:
            when: names the state in error messages.
            with_momentum: store the optimizer state of the tables too.

        Raises:
            UserError: a weight is not finite. The folder keeps its content then.
        """
        rank = dist.get_rank()
        writing = self.job.checkpoints.writing(f"{folder}: the model after {when}")
        with trainer.engine.ema_weights(), writing:
            tables = trainer.engine.table_shards()
            dense = trainer.engine.dense_state()
            momentum = trainer.engine.momentum_shards() if with_momentum else {}
            named_momentum = {f"momentum of {name}": tensor for name, tensor in momentum.items()}
            weights = {**tables, **dense, **named_momentum}
            self.finite_check.check_weights(when, trainer.name, weights)

            if rank == 0:
                remove_model(folder)
            dist.barrier()
            write_tables(folder, rank, tables)
            if with_momentum:
                write_tables(folder, rank, momentum, MOMENTUM)
            dist.barrier()
            if rank == 0:
                self._commit(folder, trainer, network, facts, dense, user_features)
            dist.barrier()

    def _commit(
        self,
        folder: AnyPath,
        trainer: ModelTrainer,
        network: ModelConfig,
        facts: Facts,
        dense: Mapping[str, Tensor],
        user_features: UserFeatures | None,
    ) -> None:
        """Write what is not in the tables, the manifest last (rank 0)."""
        if user_features:
            assert isinstance(folder, Path)
            user_features.write(folder)
        serving = {
            name.removeprefix("network."): tensor
            for name, tensor in dense.items()
            if name.startswith("network.")
        }
        tasks = tuple(self.schema.tasks[task] for task in trainer.tasks)
        example = arm_schema(trainer.arm, self.schema, self.job.config)
        commit_model(folder, network, example, tasks, serving, facts)


def _wait_for(
    is_ready: Callable[[], bool],
    root: AnyPath,
    problem: str,
    remedy: str,
) -> None:
    """Wait for files that another role writes below `root`; UserError after an hour."""
    deadline = time.monotonic() + FEED_WAIT_S
    while not is_ready():
        if time.monotonic() > deadline:
            raise UserError(f"{problem} within {FEED_WAIT_S:.0f} s; {remedy}")
        time.sleep(poll_interval(root, POLL_S))
