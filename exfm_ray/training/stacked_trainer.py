"""Trains several models as one: one student and arm under different settings and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from exfm_ray.config.arms import Objective
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
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
from exfm_ray.training.job import Job, arm_schema
from exfm_ray.training.model_trainer import ModelName, ModelTrainer
from exfm_ray.training.table_sharing import TableSharing


@dataclass
class StackedTrainer(ModelTrainer):
    """Trains models of the same structure as one.

    Attributes:
        jobs: the job of each model.
        failed: positions of models whose predictions are no longer finite; they have no figures
            from then on.
    """

    jobs: list[Job] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)

    @property
    def all_model_names(self) -> list[ModelName]:
        """Names of all models in the order of the jobs: the student's name with a number."""
        return [
            ModelName(f"{self.name}#{number}", f"{self.model}#{number}")
            for number in range(len(self.jobs))
        ]

    @property
    def model_names(self) -> Sequence[ModelName]:
        """Names of the models that have not failed."""
        return [
            model_name
            for number, model_name in enumerate(self.all_model_names)
            if number not in self.failed
        ]

    def predict(self, batch: Batch) -> Mapping[str, Tensor]:
        logits_KBT = self.engine.predict(batch)
        is_bad_KBT = ~logits_KBT.isfinite()
        diverged_K = is_bad_KBT.any(dim=(1, 2))
        failed_X = torch.nonzero(diverged_K)[:, 0]
        self.failed.update(failed_X.tolist())

        names = [model_name.name for model_name in self.all_model_names]
        return dict(zip(names, logits_KBT, strict=True))

    def move(
        self,
        source: int,
        target: int,
        job: Job,
    ) -> None:
        """Copy model `source` over model `target`, which goes on under the settings of `job`."""
        self.jobs[target] = job
        self.failed.discard(target)
        self.weights = stacked_weights([job.config for job in self.jobs])

        assert isinstance(self.engine, StackedEngine)
        students = self.engine.dense
        students.copy(source, target)
        students.set_rates(target, dense_rates(job.trainer))
        students.beta_K[target] = job.config.distillation.ah.beta

        tables = self.engine.tables
        tables.copy(source, target)
        tables.rate_K[target] = job.trainer_for(self.arm).optimizer.table_lr

        if isinstance(self.adapter, StackedModule):
            self.adapter.copy(source, target)
            self.adapter.set_rates(target, {"lr": job.config.distillation.sa.lr})


def stacked(
    jobs: Sequence[Job],
    schema: Schema,
    teachers: Sequence[int],
) -> tuple[StackedTrainer, BatchGroup]:
    """Build the trainer of all `jobs` and its group.

    Args:
        jobs: each has one student and one arm, the same for all.
        teachers: for each job, which teacher's predictions it reads if the rows hold those of
            several teachers side by side.

    Raises:
        UserError: the jobs differ in more than their seeds and `STACKABLE`, or have a setting that
            models trained together cannot have.
    """
    check_alike(jobs)
    config = jobs[0].config
    (student,) = jobs[0].students
    trainer = _stacked_trainer(jobs, student, schema)

    task_count = len(trainer.tasks)
    teacher_columns = [
        list(range(teacher * task_count, (teacher + 1) * task_count)) for teacher in teachers
    ]
    group = BatchGroup(
        schema,
        [trainer],
        schema.domain_index(student.domain),
        config.vm.batch_size,
        trainer.engine.device,
        teacher_columns,
        teacher_tasks=(max(teachers) + 1) * task_count,
        sharing=TableSharing.from_config(config, student, schema),
    )
    return trainer, group


def _stacked_trainer(
    jobs: Sequence[Job],
    student: StudentConfig,
    schema: Schema,
) -> StackedTrainer:
    config = jobs[0].config
    (arm,) = config.vm.arms
    network = student.model or config.vm.model
    tasks = tuple(schema.task_index(task) for task in student.tasks)
    schema = arm_schema(arm, schema, config)
    seeds = [job.config.seed for job in jobs]
    settings = [job.config.distillation for job in jobs]

    students = [
        Student(build_network(network, schema, len(tasks), seed), arm.objective, setting, seed)
        for seed, setting in zip(seeds, settings, strict=True)
    ]
    adapter = None
    if arm.objective is Objective.AH_SA:
        adapters = [
            Adapter(setting.sa, len(tasks), seed)
            for seed, setting in zip(seeds, settings, strict=True)
        ]
        rates = [{"lr": setting.sa.lr} for setting in settings]
        adapter = StackedModule(adapters, torch.optim.Adam, rates)

    trainer_configs = [job.trainer_for(arm) for job in jobs]
    return StackedTrainer(
        student.name,
        arm,
        tasks,
        StackedEngine(schema, trainer_configs, students, network, seeds),
        stacked_weights([job.config for job in jobs]),
        adapter,
        jobs=list(jobs),
    )


def stacked_weights(configs: Sequence[Config]) -> Weights:
    """The loss weights of all models, each float32 (K, 1, 1)."""
    weights = [Weights.from_config(config.distillation) for config in configs]
    by_term = zip(*weights, strict=True)
    stacked_terms = [torch.tensor(values).view(-1, 1, 1) for values in by_term]
    return Weights(*stacked_terms)


def check_alike(jobs: Sequence[Job]) -> None:
    """Raise a UserError if jobs cannot learn together."""
    config = jobs[0].config
    networks = [student.model or config.vm.model for student in jobs[0].students]
    unsupported = {
        "vm.precision": config.vm.precision != "fp32",
        "vm.optimizer.ema": config.vm.optimizer.ema > 0,
        "vm.compile": config.vm.compile,
        "vm.optimizer.table_weight_decay": config.vm.optimizer.table_weight_decay > 0,
        "vm.evict_after_windows": config.vm.evict_after_windows is not None,
        "vm.model.dropout": any(network.dropout > 0 for network in networks),
    }
    for setting, is_used in unsupported.items():
        if is_used:
            raise UserError(
                f"setting '{setting}' is in use: models that learn together cannot have it; "
                "leave it out, or set tune.trials_per_process=1"
            )

    for job in jobs[1:]:
        if job.students != jobs[0].students or _common(job.config) != _common(config):
            raise UserError(
                "models that learn together may differ in their seeds and in "
                f"{', '.join(sorted(STACKABLE))} only"
            )


def _common(config: Config) -> dict[str, object]:
    """What must be equal: every setting but the seed and the stackable ones."""
    settings = _flat(config.model_dump(mode="json"), "")
    return {name: value for name, value in settings.items() if name not in STACKABLE | {"seed"}}


def _flat(section: Mapping[str, Any], prefix: str) -> dict[str, object]:
    """Dotted name -> value."""
    values: dict[str, object] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            values |= _flat(value, f"{name}.")
        else:
            values[name] = value
    return values
