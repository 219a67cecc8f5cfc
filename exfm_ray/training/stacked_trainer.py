"""A lane of several models: one student and arm under different settings and seeds, learning from
the same batches as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from exfm_ray.config.arms import Objective
from exfm_ray.config.root import Config
from exfm_ray.config.tune import STACKABLE
from exfm_ray.data.batch import Batch
from exfm_ray.distillation.adapter import Adapter
from exfm_ray.distillation.objective import Weights
from exfm_ray.distillation.student import Student
from exfm_ray.engine.stacked import StackedEngine, StackedModule, dense_rates
from exfm_ray.errors import UserError
from exfm_ray.models.network import build_network
from exfm_ray.schema import Schema
from exfm_ray.training.group import BatchGroup
from exfm_ray.training.job import Job
from exfm_ray.training.model_trainer import ModelName, ModelTrainer
from exfm_ray.training.table_sharing import TableSharing
from exfm_ray.training.worker import arm_schema


@dataclass
class Stack(ModelTrainer):
    """Lanes of one structure as one.

    Attributes:
        failed: learners whose predictions are no longer finite; they have no figures from then on.
    """

    jobs: list[Job] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)

    @property
    def everyone(self) -> list[ModelName]:
        """All learners, in the order of the jobs: the student's name with a number."""
        return [
            ModelName(f"{self.name}#{number}", f"{self.model}#{number}")
            for number in range(len(self.jobs))
        ]

    @property
    def learners(self) -> Sequence[ModelName]:
        """Those that have not failed."""
        return [
            learner for number, learner in enumerate(self.everyone) if number not in self.failed
        ]

    def predict(self, batch: Batch) -> Mapping[str, Tensor]:
        logits_KBT = self.engine.predict(batch)
        self.failed.update(torch.nonzero((~logits_KBT.isfinite()).any(dim=(1, 2)))[:, 0].tolist())
        return {
            learner.name: logits_BT
            for learner, logits_BT in zip(self.everyone, logits_KBT, strict=True)
        }

    def move(
        self,
        source: int,
        target: int,
        job: Job,
    ) -> None:
        """Make one model what another is, and let it learn on under `job`'s settings."""
        self.jobs[target] = job
        self.failed.discard(target)
        self.weights = stacked_weights([job.config for job in self.jobs])
        assert isinstance(self.engine, StackedEngine)
        students = self.engine.dense
        tables = self.engine.tables
        students.copy(source, target)
        students.set_rates(target, dense_rates(job.trainer))
        students.beta_K[target] = job.config.distillation.ah.beta
        tables.copy(source, target)
        tables.rate_K[target] = job.trainer_for(self.arm).optimizer.table_lr
        if isinstance(self.adapter, StackedModule):
            self.adapter.copy(source, target)
            self.adapter.set_rates(target, {"lr": job.config.distillation.sa.lr})


def stacked(
    jobs: Sequence[Job],
    schema: Schema,
    teachers: Sequence[int],
) -> tuple[Stack, BatchGroup]:
    """The stack of `jobs` and its group; each is of one student and one arm, the same for all.

    Args:
        teachers: for each job, which teacher's predictions it reads where the rows hold several's
            side by side.

    UserError where the jobs differ in more than their seeds and `STACKABLE`, or have a setting that
    only a model alone can have.
    """
    check_alike(jobs)
    first = jobs[0]
    (student,), (arm,) = first.students, first.config.vm.arms
    network = student.model or first.config.vm.model
    seeds = [job.config.seed for job in jobs]
    configs = [job.config.distillation for job in jobs]
    tasks = tuple(schema.task_index(task) for task in student.tasks)
    plain = schema
    schema = arm_schema(arm, schema, first.config)
    students = [
        Student(build_network(network, schema, len(tasks), s), arm.objective, c, s)
        for s, c in zip(seeds, configs, strict=True)
    ]
    adapter = None
    if arm.objective is Objective.AH_SA:
        adapters = [Adapter(c.sa, len(tasks), s) for s, c in zip(seeds, configs, strict=True)]
        adapter = StackedModule(adapters, torch.optim.Adam, [{"lr": c.sa.lr} for c in configs])
    engine = StackedEngine(schema, [job.trainer_for(arm) for job in jobs], students, network, seeds)
    stack = Stack(
        student.name,
        arm,
        tasks,
        engine,
        stacked_weights([job.config for job in jobs]),
        adapter,
        jobs=list(jobs),
    )
    columns = [[teacher * len(tasks) + task for task in range(len(tasks))] for teacher in teachers]
    width = (max(teachers) + 1) * len(tasks)
    return stack, BatchGroup(
        plain,
        [stack],
        schema.domain_index(student.domain),
        first.config.vm.batch_size,
        engine.device,
        columns,
        width,
        sharing=TableSharing.from_config(first.config, student, plain),
    )


def stacked_weights(configs: Sequence[Config]) -> Weights:
    """The weights of all, float32 (K, 1, 1) each."""
    each = zip(*(Weights.from_config(config.distillation) for config in configs), strict=True)
    return Weights(*(torch.tensor(values).view(-1, 1, 1) for values in each))


def check_alike(jobs: Sequence[Job]) -> None:
    """UserError where jobs cannot learn together."""
    config = jobs[0].config
    alone = {
        "vm.precision": config.vm.precision != "fp32",
        "vm.optimizer.ema": config.vm.optimizer.ema > 0,
        "vm.compile": config.vm.compile,
        "vm.optimizer.table_weight_decay": config.vm.optimizer.table_weight_decay > 0,
        "vm.evict_after_windows": config.vm.evict_after_windows is not None,
        "vm.model.dropout": any(
            (student.model or config.vm.model).dropout > 0 for student in jobs[0].students
        ),
    }
    for setting, used in alone.items():
        if used:
            raise UserError(
                f"setting '{setting}' is in use: models that learn together cannot have it; leave it out, or set tune.trials_per_process=1"
            )
    for job in jobs[1:]:
        if job.students != jobs[0].students or _common(job.config) != _common(config):
            raise UserError(
                f"models that learn together may differ in their seeds and in {', '.join(sorted(STACKABLE))} only"
            )


def _common(config: Config) -> dict[str, object]:
    """What must be equal: every setting but the seed and the stackable ones."""
    return {
        name: value
        for name, value in _flat(config.model_dump(mode="json"), "").items()
        if name not in STACKABLE | {"seed"}
    }


def _flat(section: Mapping[str, Any], prefix: str) -> dict[str, object]:
    """Dotted name -> value."""
    found: dict[str, object] = {}
    for key, value in section.items():
        found |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found
