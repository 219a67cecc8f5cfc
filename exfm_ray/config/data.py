"""The raw data set and how it becomes a stream: the section `data` of the config."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from exfm_ray.base import FrozenModel, Name, RelativePattern
from exfm_ray.errors import UserError
from exfm_ray.storage.paths import absolute

SECRET = re.compile("password|secret|token|key.pem|ssl.key$")
"""Options of librdkafka whose values are for nobody's eyes."""
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")

Rows = Annotated[int, Field(ge=2, le=2**31 - 1)]
AbsolutePath = Annotated[Path, AfterValidator(absolute)]
"""Absolute from the start: a run's workers have working folders of their own, and a job's goes away
with it."""


class WindowConfig(FrozenModel):
    """How the stream is cut. `time`: by event time; `rows`: every so many events, for data that
    have only an order; `file`: each file of the raw data is a window, for static sets that come
    split into training, validation and test."""

    by: Literal["time", "rows", "file"] = "time"
    length_s: int = Field(86_400, ge=1, description="seconds in a window (by: time)")
    offset_s: int = Field(
        0,
        description="windows start at multiples of length_s plus this many seconds since the epoch",
    )
    rows: int = Field(100_000, ge=1, description="events in a window (by: rows)")
    empty: Literal["error", "keep"] = Field(
        "error",
        description="a window without any event (by: time): refuse it, or keep it as an empty window",
    )


class SyntheticConfig(FrozenModel):
    """The synthetic stream: a generator of ad events whose true click probability is known."""

    seed: int = 0
    windows: int = Field(12, ge=1)
    events_per_window: int = Field(50_000, ge=1)
    users: int = Field(20_000, ge=2)
    ads: int = Field(4_000, ge=2)
    advertisers: int = Field(200, ge=2)
    churn: float = Field(
        0.02,
        ge=0,
        le=1,
        description="share of users and of ads that are replaced by new ones each window",
    )
    drift: float = Field(
        0.15, ge=0, description="angle in radians by which user vectors turn each window"
    )
    shift_at: int | None = Field(
        None,
        ge=1,
        description="window at which all user vectors turn at once by a right angle's third",
    )


class KafkaConfig(FrozenModel):
    """Where the events of the source `kafka` are."""

    servers: str = Field(description="host:port, several with commas between")
    topic: Name = Field(description="topic of the events")
    options: dict[str, str | int | float | bool] = Field(
        {},
        description="more settings of librdkafka, such as security.protocol; a value ${NAME} is that of the environment",
    )

    @field_validator("options")
    @classmethod
    def _secrets(
        cls, options: dict[str, str | int | float | bool]
    ) -> dict[str, str | int | float | bool]:
        """A run's folder holds its config, so no secret may stand there."""
        for name, value in options.items():
            if SECRET.search(name) and not VARIABLE.fullmatch(str(value)):
                raise ValueError(
                    f"option {name} would be written into the run's config; put it into the environment and write {name}: ${{NAME}}"
                )
        return options

    def resolved(self) -> dict[str, str | int | float | bool]:
        """The options with the environment's values; UserError where one is not set."""
        found = dict(self.options)
        for name, value in self.options.items():
            if variable := VARIABLE.fullmatch(str(value)):
                if variable[1] not in os.environ:
                    raise UserError(
                        f"setting 'data.follow.kafka.options': {name} is ${{{variable[1]}}}, which the environment does not have"
                    )
                found[name] = os.environ[variable[1]]
        return found


class FollowConfig(FrozenModel):
    """A stream without an end: `run.py prepare` takes new events and labels as they come, until the
    file `_END` lies in data.root."""

    labels: RelativePattern | None = Field(
        None,
        description="label files below data.root, a name pattern, csv or parquet by their suffix; a topic of kafka",
    )
    kafka: KafkaConfig | None = Field(None, description="of the source `kafka`")
    lateness_s: int = Field(
        0,
        ge=0,
        description="an event may come this much after a younger one; its window is cut when that time is over",
    )
    poll_s: float = Field(5.0, gt=0, description="seconds between two looks at what has come")


def _current_source(source: object) -> object:
    """`embedded` is the former name of the synthetic stream."""
    return "synthetic" if source == "embedded" else source


class DataConfig(FrozenModel):
    """The raw data set and how it becomes a stream."""

    old_names: ClassVar[Mapping[str, str]] = {"embedded": "synthetic"}

    source: Annotated[
        Literal[
            "synthetic", "kuairand", "movielens", "frappe", "criteo", "avazu", "table", "kafka"
        ],
        BeforeValidator(_current_source),
    ] = "synthetic"
    root: AbsolutePath = Field(
        Path(), validate_default=True, description="folder of the raw data set"
    )
    schema_file: AbsolutePath | None = Field(
        None, description="schema of a `table` or `kafka` source (see docs/data.md)"
    )
    window: WindowConfig = WindowConfig()
    duplicates: Literal["keep", "drop"] = "keep"
    max_rows: int | None = Field(None, ge=1, description="stop after this many events")
    fragment_rows: int = Field(
        50_000, ge=1, description="events in a fragment, the unit of work of DAS and feed"
    )
    hash_rows: int = Field(
        100_000,
        ge=2,
        description="table rows of hashed high-cardinality features in the built-in sources",
    )
    table_rows: dict[Name, Rows] = Field(
        {},
        description="rows of hashed tables by name, instead of hash_rows or of the schema file's",
    )
    memory_mb: int = Field(
        1_000, ge=100, description="memory that sorting raw data may use before it goes to disk"
    )
    attribution_s: dict[Name, Annotated[int, Field(ge=0)]] = Field(
        {},
        description="seconds after a window's end for which its labels of a task are waited for; 0 or absent: the label stands with the event",
    )
    late_labels: Literal["count", "correct"] = Field(
        "count",
        description="labels that come after their window's release: only counted, or learnt as positives with a later window",
    )
    follow: FollowConfig | None = Field(
        None, description="take files of a `table` source, or messages from kafka, as they come"
    )
    synthetic: SyntheticConfig = SyntheticConfig()

    @property
    def delayed(self) -> dict[str, int]:
        """Seconds of attribution of the tasks whose labels come after their events."""
        return {task: seconds for task, seconds in self.attribution_s.items() if seconds}

    @model_validator(mode="after")
    def _followed(self) -> Self:
        if (self.source == "kafka") != bool(self.follow and self.follow.kafka):
            raise ValueError(
                "data.follow.kafka says where the events of the source 'kafka' are; set both, or none"
            )
        if self.follow is None:
            return self
        if self.source not in ("table", "kafka"):
            raise ValueError(
                f"data.follow is set with the source '{self.source}', which has an end; set data.source=table, or remove data.follow"
            )
        if self.window.by != "time":
            raise ValueError(
                f"data.follow cuts windows by time; data.window.by is '{self.window.by}'"
            )
        if self.max_rows is not None:
            raise ValueError("data.follow has no end; remove data.max_rows")
        if bool(self.follow.labels) != bool(self.delayed):
            raise ValueError(
                "data.follow.labels says where labels come from, data.attribution_s which ones do; set both, or none"
            )
        return self
