"""How the FM and the vertical models are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from exfm_ray.base import FrozenModel, Name
from exfm_ray.config.arms import ALL_OBJECTIVES, Arm
from exfm_ray.config.models import MLPConfig, ModelConfig, WukongConfig


class OptimizerConfig(FrozenModel):
    """Row-wise Adagrad for the embedding tables, Adam for the dense part."""

    table_lr: float = Field(0.05, gt=0, description="Learning rate of the embedding tables.")
    table_weight_decay: float = Field(
        0.0,
        ge=0,
        description="L2 weight decay of table rows: this fraction of a row is added to its "
        "gradient in steps that use the row.",
    )
    dense_lr: float = Field(1e-3, gt=0, description="Learning rate of the dense part.")
    dense_weight_decay: float = Field(0.0, ge=0, description="Weight decay of the dense part.")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per step of an exponential moving average of all weights, which is then "
        "evaluated and published; 0: the weights themselves.",
    )


EXECUTION_SETTINGS = {"workers", "min_workers", "zero_stage", "sharding", "threads"}
"""Settings of a trainer that determine how training is spread over processes."""


class TrainerConfig(FrozenModel):
    """Settings that FM and VM training have in common."""

    old_names: ClassVar[Mapping[str, str]] = {"reset_unused": "evict_after_windows"}

    optimizer: OptimizerConfig = Field(
        OptimizerConfig(), description="Learning rates and weight decay."
    )
    batch_size: int = Field(
        1024, ge=1, description="Examples in a global batch, which the workers divide among them."
    )
    workers: int = Field(1, ge=1, description="Worker processes of a training job.")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="Elastic training: after a loss of workers the job continues by itself from "
        "its last checkpoint, with as many workers as are left, at least this many. null: the loss "
        "of a worker ends the run; rerun the same command to resume.",
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Device that the workers train on.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Number format of the interaction model; tables stay in fp32."
    )
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest",
        description="Argument of torch.set_float32_matmul_precision. Below highest: TF32 on a GPU, "
        "faster kernels on a CPU.",
    )
    compile: bool = Field(False, description="Compile the interaction model with torch.compile.")
    zero_stage: int = Field(
        0,
        ge=0,
        le=3,
        description="DeepSpeed ZeRO stage of the dense part. 0: no sharding; 1: optimizer state; "
        "2: also gradients; 3: also weights.",
    )
    sharding: Literal["row_wise", "table_wise"] = Field(
        "row_wise",
        description="How embedding tables are spread over the workers: each table cut by rows, or "
        "each table whole on one worker.",
    )
    threads: int = Field(0, ge=0, description="Torch threads of a CPU worker; 0: torch's default.")
    evict_after_windows: int | None = Field(
        None,
        ge=1,
        description="Reset rows, with their optimizer state, that no example of this many last "
        "windows has used; null: never.",
    )

    @model_validator(mode="after")
    def _check_zero3(self) -> Self:
        in_use = {"optimizer.ema": self.optimizer.ema > 0, "compile": self.compile}
        for setting, used in in_use.items():
            if used and self.zero_stage == 3:
                raise ValueError(
                    f"{setting} is set with zero_stage 3, in which no worker holds complete "
                    "weights; choose stage 0, 1 or 2"
                )
        return self

    @model_validator(mode="after")
    def _check_min_workers(self) -> Self:
        least = self.min_workers
        if least is not None and least > self.workers:
            raise ValueError(f"min_workers is {least}, above workers = {self.workers}")
        return self


class StaticConfig(FrozenModel):
    """Training on a set without time.

    The windows before `validation_window` are learned in several passes, until the metric of that
    window stops improving.
    """

    passes: int = Field(50, ge=1, description="Passes over the training windows at most.")
    patience: int = Field(
        3, ge=1, description="Passes without improvement after which training ends."
    )
    monitor: Literal["auc", "log_loss"] = Field(
        "auc", description="Metric of the validation window that chooses the best pass."
    )
    validation_window: int = Field(
        1,
        ge=1,
        description="Number of the validation window. Later windows are test sets: they are "
        "evaluated after each pass and never used for the choice.",
    )


class FMConfig(TrainerConfig):
    """The foundation model: one network for all domains, with one head per task."""

    name: Name = Field(
        "fm", description="Name of the foundation model in files, charts and `teacher` settings."
    )
    static: StaticConfig | None = Field(
        None,
        description="Train in several passes over a static set; null: one pass over the stream.",
    )
    tasks: tuple[Name, ...] = Field(
        (), description="Tasks that it learns; empty: all tasks of the stream."
    )
    model: ModelConfig = Field(WukongConfig(), description="Its interaction model.")


def _as_list(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return value


def _check_distinct(tasks: tuple[str, ...]) -> tuple[str, ...]:
    if not tasks:
        raise ValueError("names no task; set one, or a list of them")
    for task in tasks:
        if tasks.count(task) > 1:
            raise ValueError(f"names task '{task}' twice")
    return tasks


class StudentConfig(FrozenModel):
    """A vertical model: its domain, tasks, teacher and network."""

    old_names: ClassVar[Mapping[str, str]] = {"publishes": "published_arm"}

    model_config = ConfigDict(serialize_by_alias=True)

    name: Name = Field(description="Name of the vertical model in files and charts.")
    domain: Name = Field(description="Domain that it serves, or `all`.")
    teacher: Name | None = Field(
        None, description="Teacher that supervises it, one of `teachers`; null: the FM."
    )
    published_arm: Arm | None = Field(
        None,
        description="Arm whose model publishes a snapshot after each window, so that it can be a "
        "teacher itself; null: no arm.",
    )
    tasks: Annotated[
        tuple[Name, ...], BeforeValidator(_as_list), AfterValidator(_check_distinct)
    ] = Field(alias="task", description="Its task, or a list of tasks.")
    model: ModelConfig | None = Field(
        None, description="Its interaction model; null: that of vm.model."
    )


class VMConfig(TrainerConfig):
    """The vertical models, and how they are trained."""

    old_names: ClassVar[Mapping[str, str]] = {
        **TrainerConfig.old_names,
        "share_pass": "shared_pass",
    }

    models: tuple[StudentConfig, ...] = Field(
        (), description="The vertical models; empty: train the FM only."
    )
    model: ModelConfig = Field(
        MLPConfig(), description="Interaction model of the vertical models that name none."
    )
    arms: tuple[Arm, ...] = Field(
        ALL_OBJECTIVES,
        min_length=1,
        description="Arms that each vertical model is trained with: labels, kd, ah or ah_sa, with "
        "the options +share and +history.",
    )
    shared_pass: bool = Field(
        True,
        description="Train all vertical models in one worker group, from one pass over the data; "
        "otherwise each one is a job of its own.",
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [student.name for student in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two vertical models are named '{name}'")

        distinct_arms = set(self.arms)
        if len(distinct_arms) < len(self.arms):
            raise ValueError("an arm is named twice in vm.arms")
        return self


class CheckpointConfig(FrozenModel):
    """Checkpoints of FM and VM training.

    There is one at the end of every window, or of every pass over a static set.
    """

    every_examples: int | None = Field(
        None,
        ge=1,
        description="Also write a checkpoint inside a window whenever a job has learned this many "
        "examples; null: at the ends only.",
    )
    keep: int = Field(
        2,
        ge=1,
        description="Newest checkpoints to keep. With more than one, a damaged file does not cost "
        "the whole run.",
    )
