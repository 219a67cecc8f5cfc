"""How FM and VMs are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from exfm_ray.base import FrozenModel, Name
from exfm_ray.config.arms import ALL_OBJECTIVES, Arm
from exfm_ray.config.models import MLPConfig, ModelConfig, WukongConfig


class OptimizerConfig(FrozenModel):
    """Row-wise Adagrad for the tables, Adam for the dense part."""

    table_lr: float = Field(0.05, gt=0)
    table_weight_decay: float = Field(
        0.0,
        ge=0,
        description="L2: this much of a row is added to its gradient, in steps that use the row",
    )
    dense_lr: float = Field(1e-3, gt=0)
    dense_weight_decay: float = Field(0.0, ge=0)
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay per step of an exponential moving average of all weights, which is evaluated and published instead",
    )


EXECUTION_SETTINGS = {"workers", "min_workers", "zero_stage", "sharding", "threads"}
"""Settings of a trainer that say how training is spread."""


class TrainerConfig(FrozenModel):
    """What FM and VM training have in common."""

    old_names: ClassVar[Mapping[str, str]] = {"reset_unused": "evict_after_windows"}

    optimizer: OptimizerConfig = OptimizerConfig()
    batch_size: int = Field(
        1024, ge=1, description="global: the workers divide each batch among them"
    )
    workers: int = Field(1, ge=1)
    min_workers: int | None = Field(
        None,
        ge=1,
        description="elastic: after the loss of workers the job goes on by itself, from its last checkpoint, with as many as there "
        "are, at least these; without it the loss of a worker ends the run, and the same command goes on",
    )
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest",
        description="torch.set_float32_matmul_precision: TF32 on a GPU and faster kernels on a CPU, where below highest",
    )
    compile: bool = Field(False, description="torch.compile the interaction model")
    zero_stage: int = Field(0, ge=0, le=3)
    sharding: Literal["row_wise", "table_wise"] = "row_wise"
    threads: int = Field(
        0, ge=0, description="torch threads of a CPU worker; 0 leaves torch's own choice"
    )
    evict_after_windows: int | None = Field(
        None,
        ge=1,
        description="rows that no example of the last so many windows used are reset, with their optimizer state",
    )

    @model_validator(mode="after")
    def _check_zero3(self) -> Self:
        for setting, used in (("optimizer.ema", self.optimizer.ema > 0), ("compile", self.compile)):
            if used and self.zero_stage == 3:
                raise ValueError(
                    f"{setting} is set with zero_stage 3, where no worker holds the weights whole; choose stage 0, 1 or 2"
                )
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, above workers = {self.workers}")
        return self


class StaticConfig(FrozenModel):
    """A set without time: the windows before `validation_window` are learnt in several passes,
    until that window's figure stops improving."""

    passes: int = Field(50, ge=1)
    patience: int = Field(
        3, ge=1, description="passes without improvement after which training ends"
    )
    monitor: Literal["auc", "log_loss"] = "auc"
    validation_window: int = Field(
        1,
        ge=1,
        description="later windows are tests: evaluated after each pass, never looked at by the choice",
    )


class FMConfig(TrainerConfig):
    """The foundation model: one network, all domains, a head for every task."""

    name: Name = "fm"
    static: StaticConfig | None = Field(
        None, description="several passes over a static set instead of one over the stream"
    )
    tasks: tuple[Name, ...] = Field(
        (), description="tasks it learns; empty means all of the stream's"
    )
    model: ModelConfig = WukongConfig()


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _distinct(tasks: tuple[str, ...]) -> tuple[str, ...]:
    if not tasks:
        raise ValueError("names no task; give one, or a list of them")
    for task in tasks:
        if tasks.count(task) > 1:
            raise ValueError(f"names task '{task}' twice")
    return tasks


class StudentConfig(FrozenModel):
    """One vertical model: its domain, its task or list of tasks, its network (`vm.model` where it
    names none)."""

    old_names: ClassVar[Mapping[str, str]] = {"publishes": "published_arm"}

    model_config = ConfigDict(serialize_by_alias=True)

    name: Name
    domain: Name
    teacher: Name | None = Field(
        None,
        description="the teacher whose supervision it learns from: one of `teachers`; None: the FM",
    )
    published_arm: Arm | None = Field(
        None,
        description="its model of this arm publishes a snapshot after each window and so can be a teacher itself",
    )
    tasks: Annotated[tuple[Name, ...], BeforeValidator(_listed), AfterValidator(_distinct)] = Field(
        alias="task"
    )
    model: ModelConfig | None = None


class VMConfig(TrainerConfig):
    """The vertical models. With `shared_pass` all of them learn in one worker group from one pass
    of the data."""

    old_names: ClassVar[Mapping[str, str]] = {
        **TrainerConfig.old_names,
        "share_pass": "shared_pass",
    }

    models: tuple[StudentConfig, ...] = ()
    model: ModelConfig = MLPConfig()
    arms: tuple[Arm, ...] = Field(ALL_OBJECTIVES, min_length=1)
    shared_pass: bool = True

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [m.name for m in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two vertical models are named '{name}'")
        if len(set(self.arms)) != len(self.arms):
            raise ValueError("an arm is named twice in vm.arms")
        return self


class CheckpointConfig(FrozenModel):
    """Checkpoints of FM and VM training. There is one at the end of every window (of every pass,
    over a static set)."""

    every_examples: int | None = Field(
        None,
        ge=1,
        description="another one inside a window whenever a job has learnt so many examples",
    )
    keep: int = Field(
        2,
        ge=1,
        description="the newest so many stay; more than one, lest a damaged file cost the whole run",
    )
