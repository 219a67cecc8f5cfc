"""The root of the config tree. It is typed and frozen, and unknown keys are errors.

Keys read like the papers: w, alpha, beta (ExFM, arXiv 2502.17494), l, n_F, n_L, k (Wukong, arXiv
2403.02545).
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import model_validator

from exfm_ray.config.arms import Arm
from exfm_ray.config.checks import check_sweep, check_teachers
from exfm_ray.config.sections import Sections
from exfm_ray.storage.paths import store_root
from exfm_ray.storage.remote import AnyPath


class Config(Sections):
    """All settings of a run."""

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
