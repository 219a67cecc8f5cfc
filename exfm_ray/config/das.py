"""The Data Augmentation System, and teachers beside the FM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator

from exfm_ray.base import FrozenModel, Name
from exfm_ray.config.data import AbsolutePath


class DASConfig(FrozenModel):
    """The Data Augmentation System: a pool of actors that write the FM's predictions into the
    training data."""

    old_names: ClassVar[Mapping[str, str]] = {
        "every": "snapshot_stride",
        "pinned": "pinned_version",
        "rollover": "max_concurrent_reloads",
        "shards": "table_shards",
        "tries": "max_attempts",
        "ahead": "max_windows_ahead",
    }

    min_actors: int = Field(1, ge=1)
    max_actors: int = Field(1, ge=1)
    fm_lag: int = Field(
        1,
        ge=1,
        description="window t is scored by the snapshot that has learned windows <= t - fm_lag",
    )
    snapshot_stride: int = Field(
        1,
        ge=1,
        description="only every so many snapshots are scored with: versions 1, 1 + every, 1 + 2 every ...",
    )
    pinned_version: int | None = Field(
        None,
        ge=1,
        description="score every window that may be with this version; earlier windows have no teacher",
    )
    keep_snapshots: bool = Field(
        False,
        description="snapshots that no window of this run needs any more stay, for other runs to score with",
    )
    max_concurrent_reloads: int = Field(
        1,
        ge=1,
        description="how many actors may be loading a next snapshot at once, while the others score",
    )
    table_shards: int = Field(
        1,
        ge=1,
        description="the teacher's tables are cut over so many processes for each actor; 1: the actor holds them",
    )
    max_attempts: int = Field(
        3,
        ge=1,
        description="after so many failures a fragment is parked and its window left out, until the DAS is asked again",
    )
    max_windows_ahead: int | None = Field(
        None,
        ge=1,
        description="most windows supervised ahead of the slowest vertical model; None: no bound",
    )
    batch_size: int = Field(
        512,
        ge=1,
        description="on a CPU small: larger temporaries cost more in page faults than they save",
    )
    threads: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.max_actors < self.min_actors:
            raise ValueError(
                f"das.max_actors is {self.max_actors}, below das.min_actors = {self.min_actors}"
            )
        if self.pinned_version and self.snapshot_stride > 1:
            raise ValueError(
                f"das.pinned_version is {self.pinned_version} and das.snapshot_stride is {self.snapshot_stride}: set one of them"
            )
        return self


class TeacherConfig(FrozenModel):
    """A teacher beside the FM: its snapshots score the stream, too. It has to have been trained on
    windows of the same stream.

    `run`: the folder of the run whose FM it is (with das.keep_snapshots there), by its fm.name;
    None: it is a vertical model of this run that `publishes`.
    """

    name: Name
    run: AbsolutePath | None = None
