"""The sections of the config tree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from exfm_ray.base import FrozenModel, Name
from exfm_ray.config.das import DASConfig, TeacherConfig
from exfm_ray.config.data import AbsolutePath, DataConfig
from exfm_ray.config.distillation import DistillationConfig
from exfm_ray.config.placement import PlacementConfig
from exfm_ray.config.trainer import CheckpointConfig, FMConfig, VMConfig
from exfm_ray.config.tune import TuneConfig
from exfm_ray.storage.remote import check_url


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


class Sections(FrozenModel):
    """All settings of a run, before they are checked against each other."""

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
