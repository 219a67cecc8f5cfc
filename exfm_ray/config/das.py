"""The Data Augmentation System, and teachers beside the FM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator

from exfm_ray.base import FrozenModel, Name
from exfm_ray.config.data import AbsolutePath


class DASConfig(FrozenModel):
    """The Data Augmentation System: actors that write the FM's predictions into the stream."""

    old_names: ClassVar[Mapping[str, str]] = {
        "every": "snapshot_stride",
        "pinned": "pinned_version",
        "rollover": "max_concurrent_reloads",
        "shards": "table_shards",
        "tries": "max_attempts",
        "ahead": "max_windows_ahead",
    }

    min_actors: int = Field(1, ge=1, description="Actors that score at least.")
    max_actors: int = Field(
        1, ge=1, description="Actors that score at most; the pool grows while work is waiting."
    )
    fm_lag: int = Field(
        1,
        ge=1,
        description="Lag of the teacher in windows: window t is scored by the snapshot that has "
        "learned windows <= t - fm_lag.",
    )
    snapshot_stride: int = Field(
        1,
        ge=1,
        description="Score with every n-th snapshot only: versions 1, 1 + n, 1 + 2 n, and so on.",
    )
    pinned_version: int | None = Field(
        None,
        ge=1,
        description="Score all windows with this snapshot version; windows that it may not "
        "supervise have no teacher. null: the newest allowed version.",
    )
    keep_snapshots: bool = Field(
        False,
        description="Keep snapshots that no window of this run needs any more, so that other runs "
        "can score with them.",
    )
    max_concurrent_reloads: int = Field(
        1,
        ge=1,
        description="Actors that may load a new snapshot at the same time while the others score.",
    )
    table_shards: int = Field(
        1,
        ge=1,
        description="Processes per actor over which the teacher's tables are cut; 1: the actor "
        "holds them itself.",
    )
    max_attempts: int = Field(
        3,
        ge=1,
        description="Attempts to score a fragment. After the last one it counts as failed, and its "
        "window has no supervision until the DAS is asked for it again.",
    )
    max_windows_ahead: int | None = Field(
        None,
        ge=1,
        description="Windows that may be scored ahead of the slowest vertical model; null: no "
        "limit.",
    )
    batch_size: int = Field(
        512,
        ge=1,
        description="Examples in a forward pass. Small on a CPU: larger temporaries cost more in "
        "page faults than they save.",
    )
    threads: int = Field(0, ge=0, description="Torch threads of an actor; 0: torch's default.")

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max_actors < self.min_actors:
            raise ValueError(
                f"das.max_actors is {self.max_actors}, below das.min_actors = {self.min_actors}"
            )
        if self.pinned_version and self.snapshot_stride > 1:
            raise ValueError(
                f"das.pinned_version is {self.pinned_version} and das.snapshot_stride is "
                f"{self.snapshot_stride}: set only one of them"
            )
        return self


class TeacherConfig(FrozenModel):
    """A teacher beside the FM, whose snapshots score the stream, too.

    It must have been trained on windows of the same stream.
    """

    name: Name = Field(
        description="Name of the teacher: the fm.name of `run`, or a vertical model of this run "
        "with a `published_arm`."
    )
    run: AbsolutePath | None = Field(
        None,
        description="Folder of the run whose FM this is; that run needs das.keep_snapshots. null: "
        "the teacher is a vertical model of this run.",
    )
