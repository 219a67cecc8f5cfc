"""The root of the config tree. It is typed and frozen, and unknown keys are errors.

Keys read like the papers: w, alpha, beta (ExFM, arXiv 2502.17494), l, n_F, n_L, k (Wukong, arXiv
2403.02545).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from exfm_ray.base import FrozenModel, Name
from exfm_ray.config.arms import Arm
from exfm_ray.config.checks import check_sweep, check_teachers
from exfm_ray.config.das import DASConfig, TeacherConfig
from exfm_ray.config.data import AbsolutePath, DataConfig
from exfm_ray.config.distillation import DistillationConfig
from exfm_ray.config.placement import PlacementConfig
from exfm_ray.config.trainer import CheckpointConfig, FMConfig, VMConfig
from exfm_ray.config.tune import TuneConfig
from exfm_ray.storage.paths import store_root
from exfm_ray.storage.remote import AnyPath, check_url


class MetricsConfig(FrozenModel):
    """How metrics are summarized."""

    warmup_windows: int = Field(
        2, ge=0, description="Windows at the start that are left out of summary.json."
    )


class RunConfig(FrozenModel):
    """Where a run is stored."""

    dir: AbsolutePath = Field(
        Path("runs"),
        validate_default=True,
        description="Folder of all runs; a run's own folder is `<dir>/<name>`.",
    )
    storage: Annotated[str, AfterValidator(check_url)] | None = Field(
        None,
        description="URL, such as s3://bucket/prefix, below which the stream, snapshots and "
        "supervision are stored; null: in the run's folder.",
    )


class WandbConfig(FrozenModel):
    """Runs in wandb (Weights & Biases), stored in `<run>/wandb`.

    The API key is not a setting: wandb reads WANDB_API_KEY or .netrc.
    """

    mode: Literal["offline", "online", "disabled"] = Field(
        "offline",
        description="offline: write files that `wandb sync` sends later; online: send at once; "
        "disabled: write nothing.",
    )
    project: Name = Field("exfm-ray", description="wandb project of the runs.")


class Config(FrozenModel):
    """All settings of a run."""

    name: Name = Field(
        "run", description="Name of the run; by default the stem of the config file."
    )
    seed: int = Field(0, ge=0, description="Seed of all random numbers, except the data's own.")
    run: RunConfig = Field(RunConfig(), description="Where the run is stored.")
    data: DataConfig = Field(DataConfig(), description="The raw data and the stream.")
    fm: FMConfig = Field(FMConfig(), description="The foundation model.")
    das: DASConfig = Field(DASConfig(), description="The Data Augmentation System.")
    teachers: tuple[TeacherConfig, ...] = Field((), description="Teachers beside the FM.")
    vm: VMConfig = Field(VMConfig(), description="The vertical models.")
    distillation: DistillationConfig = Field(
        DistillationConfig(), description="How the arms use the teacher."
    )
    metrics: MetricsConfig = Field(MetricsConfig(), description="How metrics are summarized.")
    placement: PlacementConfig = Field(
        PlacementConfig(), description="Nodes of a cluster that each role may run on."
    )
    checkpoint: CheckpointConfig = Field(
        CheckpointConfig(), description="Checkpoints of FM and VM training."
    )
    wandb: WandbConfig = Field(WandbConfig(), description="Runs in wandb.")
    tune: TuneConfig | None = Field(
        None, description="A sweep over settings of the vertical models; null: no sweep."
    )

    @model_validator(mode="after")
    def _check_sweep(self) -> Self:
        if self.tune:
            check_sweep(self, self.tune)
        return self

    @model_validator(mode="after")
    def _check_teachers(self) -> Self:
        check_teachers(self)
        return self

    @model_validator(mode="after")
    def _check_static(self) -> Self:
        if self.fm.static and self.vm.models:
            raise ValueError(
                "fm.static is set: in a set without time, every teacher has already seen the "
                "labels; remove vm.models, or fm.static"
            )
        if self.fm.static and self.data.delayed:
            raise ValueError(
                "fm.static is set: in a set without time no label is late; remove "
                "data.attribution_s, or fm.static"
            )
        return self

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Return all arms of the vertical models, in a run or in its sweep."""
        arms = self.vm.arms
        if self.tune is not None:
            arms += self.tune.arms
        return arms

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return self.run.dir / self.name

    @property
    def stores(self) -> AnyPath:
        """Return the root of the run's stores: the run's folder, or a remote folder."""
        storage = self.run.storage
        return store_root(self.folder, self.name, storage)
