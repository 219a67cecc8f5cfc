"""The one config tree: typed, frozen, one YAML file with dotted overrides. Unknown keys are errors.

Keys read like the papers: w, alpha, beta (ExFM, arXiv 2502.17494), l, n_F, n_L, k (Wukong, arXiv
2403.02545).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from exfm_ray.base import FrozenModel, Name
from exfm_ray.config.arms import Arm
from exfm_ray.config.checks import check_sweep
from exfm_ray.config.das import DASConfig, TeacherConfig
from exfm_ray.config.data import AbsolutePath, DataConfig
from exfm_ray.config.distillation import DistillationConfig
from exfm_ray.config.placement import PlacementConfig
from exfm_ray.config.trainer import CheckpointConfig, FMConfig, VMConfig
from exfm_ray.config.tune import TuneConfig
from exfm_ray.storage.paths import store_root
from exfm_ray.storage.remote import AnyPath, check_url


class MetricsConfig(FrozenModel):
    """`warmup_windows`: how many windows at the start stay out of summary.json."""

    warmup_windows: int = Field(2, ge=0)


class RunConfig(FrozenModel):
    """Where runs go."""

    dir: AbsolutePath = Field(Path("runs"), validate_default=True)
    storage: Annotated[str, AfterValidator(check_url)] | None = Field(
        None,
        description="URL, such as s3://bucket/prefix, below which stream, snapshots and supervision lie instead of in the run's folder",
    )


class WandbConfig(FrozenModel):
    """Runs in wandb (Weights & Biases), under <run>/wandb. Its API key is no setting: wandb reads
    WANDB_API_KEY or .netrc."""

    mode: Literal["offline", "online", "disabled"] = Field(
        "offline", description="offline: files that `wandb sync` sends later; disabled: none"
    )
    project: Name = "exfm-ray"


class Config(FrozenModel):
    """A whole run."""

    name: Name = "run"
    seed: int = Field(0, ge=0)
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    fm: FMConfig = FMConfig()
    das: DASConfig = DASConfig()
    teachers: tuple[TeacherConfig, ...] = ()
    vm: VMConfig = VMConfig()
    distillation: DistillationConfig = DistillationConfig()
    metrics: MetricsConfig = MetricsConfig()
    placement: PlacementConfig = PlacementConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    wandb: WandbConfig = WandbConfig()
    tune: TuneConfig | None = Field(
        None, description="a sweep over the settings of the vertical models"
    )

    @model_validator(mode="after")
    def _sweep(self) -> Self:
        if self.tune:
            check_sweep(self, self.tune)
        return self

    @model_validator(mode="after")
    def _teachers(self) -> Self:
        names = [self.fm.name, *(teacher.name for teacher in self.teachers)]
        publishing = {student.name: student for student in self.vm.models if student.published_arm}
        for teacher in self.teachers:
            if names.count(teacher.name) > 1:
                raise ValueError(
                    f"two teachers are named '{teacher.name}' (the FM is '{self.fm.name}')"
                )
            if teacher.run is None and teacher.name not in publishing:
                raise ValueError(
                    f"teacher '{teacher.name}' has no `run`, and no vertical model of this name `publishes`"
                )
        for student in self.vm.models:
            if student.teacher and student.teacher not in names:
                raise ValueError(
                    f"vertical model '{student.name}': teacher '{student.teacher}' is none of {', '.join(names)}."
                )
            if student.published_arm and student.published_arm not in self.vm.arms:
                raise ValueError(
                    f"vertical model '{student.name}' publishes arm '{student.published_arm}', which is none of vm.arms"
                )
            if student.published_arm and student.published_arm.uses_history:
                raise ValueError(
                    f"vertical model '{student.name}' publishes arm '{student.published_arm}', whose predictions need each user's history, which the "
                    "DAS does not look up when it scores; let it publish an arm without +history"
                )
            if student.published_arm and student.name == self.fm.name:
                raise ValueError(
                    f"vertical model '{student.name}' publishes under the FM's name; rename one of them"
                )
            seen = [student.name]
            above = student.teacher
            while above in publishing and not any(t.name == above and t.run for t in self.teachers):
                if above in seen:
                    raise ValueError(
                        f"vertical model '{student.name}' would learn from itself: {' <- '.join([*seen, above])}"
                    )
                seen.append(above)
                above = publishing[above].teacher
        return self

    @model_validator(mode="after")
    def _static(self) -> Self:
        if self.fm.static and self.vm.models:
            raise ValueError(
                "fm.static is set: in a set without time no teacher is ignorant of its answers; remove vm.models, or fm.static"
            )
        if self.fm.static and self.data.delayed:
            raise ValueError(
                "fm.static is set: in a set without time no label comes late; remove data.attribution_s, or fm.static"
            )
        return self

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All that the vertical models learn by, in a run or in its sweep."""
        return (*self.vm.arms, *(self.tune.arms if self.tune else ()))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.dir / self.name

    @property
    def stores(self) -> AnyPath:
        """Where what the roles give each other lies: in the run's folder, or remote."""
        return store_root(self.folder, self.name, self.run.storage)
