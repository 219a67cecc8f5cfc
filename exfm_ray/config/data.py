"""The raw data set and how it becomes a stream: the section `data` of the config."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from exfm_ray.base import FrozenModel, Name, RelativePattern
from exfm_ray.errors import UserError, nearest
from exfm_ray.storage.paths import absolute

SECRET = re.compile("password|secret|token|key.pem|ssl.key$")
"""Matches the names of librdkafka options whose values are secret."""
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
"""Matches a reference to an environment variable, `${NAME}`."""

Rows = Annotated[int, Field(ge=2, le=2**31 - 1)]
AbsolutePath = Annotated[Path, AfterValidator(absolute)]
"""A path that is made absolute when the config is read.

The workers of a run have working folders of their own, and that of a Ray job is temporary.
"""


class WindowConfig(FrozenModel):
    """How the stream is cut into windows."""

    by: Literal["time", "rows", "file"] = Field(
        "time",
        description="time: by event time; rows: a fixed number of events, for data that have only "
        "an order; file: one window per raw file, for static sets that are split into training, "
        "validation and test.",
    )
    length_s: int = Field(86_400, ge=1, description="Length of a window in seconds (by: time).")
    offset_s: int = Field(
        0,
        description="Windows start at multiples of `length_s` plus this many seconds since the "
        "epoch (by: time).",
    )
    rows: int = Field(100_000, ge=1, description="Events in a window (by: rows).")
    empty: Literal["error", "keep"] = Field(
        "error",
        description="A window without any event (by: time). error: refuse the data; keep: keep it "
        "as an empty window.",
    )


class SyntheticConfig(FrozenModel):
    """The synthetic stream: generated ad events with known true click probabilities."""

    seed: int = Field(0, description="Seed of the generator.")
    windows: int = Field(12, ge=1, description="Windows in the stream, 1 hour each.")
    events_per_window: int = Field(50_000, ge=1, description="Events in each window.")
    users: int = Field(20_000, ge=2, description="Users at any one time.")
    ads: int = Field(4_000, ge=2, description="Ads at any one time.")
    advertisers: int = Field(200, ge=2, description="Advertisers, to whom the ads belong.")
    churn: float = Field(
        0.02,
        ge=0,
        le=1,
        description="Fraction of users and of ads that each window replaces by new ones.",
    )
    drift: float = Field(
        0.15, ge=0, description="Angle by which user vectors turn each window, in radians."
    )
    shift_at: int | None = Field(
        None,
        ge=1,
        description="Window at which all user vectors turn by 30 degrees at once; null: no such "
        "window.",
    )


class KafkaConfig(FrozenModel):
    """Where the source `kafka` reads its events."""

    servers: str = Field(description="Bootstrap servers, host:port; separate several by commas.")
    topic: Name = Field(description="Topic of the events.")
    options: dict[str, str | int | float | bool] = Field(
        {},
        description="More librdkafka settings, such as security.protocol. A value ${NAME} is read "
        "from the environment; secrets must be written so.",
    )

    @field_validator("options")
    @classmethod
    def _secrets(
        cls, options: dict[str, str | int | float | bool]
    ) -> dict[str, str | int | float | bool]:
        """Refuse secrets: the run's folder holds a copy of the config."""
        for name, value in options.items():
            is_secret = SECRET.search(name) is not None
            is_reference = VARIABLE.fullmatch(str(value)) is not None
            if is_secret and not is_reference:
                raise ValueError(
                    f"option {name} would be written into the run's config; put it into the "
                    f"environment and write {name}: ${{NAME}}"
                )
        return options

    def resolved(self) -> dict[str, str | int | float | bool]:
        """Return the options with the values of the environment filled in.

        Raises:
            UserError: a variable is not set.
        """
        options = dict(self.options)
        for name, value in self.options.items():
            reference = VARIABLE.fullmatch(str(value))
            if reference is None:
                continue

            variable = reference[1]
            if variable not in os.environ:
                raise UserError(
                    f"setting 'data.follow.kafka.options': {name} is ${{{variable}}}, which the "
                    "environment does not have"
                )
            options[name] = os.environ[variable]
        return options


class FollowConfig(FrozenModel):
    """A stream without an end: `run.py prepare` reads new events and labels as they arrive.

    It ends when a file `_END` appears in data.root.
    """

    labels: RelativePattern | None = Field(
        None,
        description="Name pattern of label files below data.root, csv or parquet by their suffix; "
        "for the source `kafka` a topic. null: labels stand with their events.",
    )
    kafka: KafkaConfig | None = Field(
        None, description="Where to read the events of the source `kafka`; null for other sources."
    )
    lateness_s: int = Field(
        0,
        ge=0,
        description="Seconds by which an event may arrive after a newer one. A window is cut when "
        "this time is over.",
    )
    poll_s: float = Field(5.0, gt=0, description="Seconds between two checks for new data.")


BUILT_IN_SOURCES = (
    "synthetic",
    "kuairand",
    "movielens",
    "frappe",
    "criteo",
    "avazu",
    "table",
    "kafka",
)
SOURCE_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""Matches the path of a source of the user's own, `my_package.my_module:my_source`."""

_registered_sources: set[str] = set()


def register_source_name(name: str) -> None:
    """Allow `name` as `data.source`. `data.sources.registry.register_source` calls this."""
    _registered_sources.add(name)


def _check_source(source: object) -> object:
    """Refuse unknown sources. `embedded` is the former name of the synthetic stream."""
    if source == "embedded":
        return "synthetic"
    if not isinstance(source, str) or SOURCE_PATH.fullmatch(source):
        return source

    names = [*BUILT_IN_SOURCES, *sorted(_registered_sources)]
    if source not in names:
        known = ", ".join(f"'{name}'" for name in names)
        raise ValueError(
            f"no such source; the sources are {known}, or my_module:my_source for one of your "
            f"own.{nearest(source, names)}"
        )
    return source


class DataConfig(FrozenModel):
    """The raw data set and how it becomes a stream."""

    old_names: ClassVar[Mapping[str, str]] = {"embedded": "synthetic"}

    source: Annotated[str, BeforeValidator(_check_source)] = Field(
        "synthetic",
        description="The data set: a built-in one, `table` for your own CSV or Parquet files, "
        "`kafka`, or `my_module:my_source` for a source of your own.",
    )
    root: AbsolutePath = Field(
        Path(),
        validate_default=True,
        description="Folder of the raw data set; by default EXFM_HOME or the working folder.",
    )
    schema_file: AbsolutePath | None = Field(
        None,
        description="Schema file of a `table` or `kafka` source, see docs/data.md; null for other "
        "sources.",
    )
    window: WindowConfig = Field(WindowConfig(), description="How the stream is cut into windows.")
    duplicates: Literal["keep", "drop"] = Field(
        "keep",
        description="What happens to repeated events. They are counted in either case.",
    )
    max_rows: int | None = Field(
        None, ge=1, description="Stop after this many events; null: read all."
    )
    fragment_rows: int = Field(
        50_000, ge=1, description="Events in a fragment, the unit of work of the DAS and the feed."
    )
    hash_rows: int = Field(
        100_000,
        ge=2,
        description="Table rows of hashed high-cardinality features in the built-in sources.",
    )
    table_rows: dict[Name, Rows] = Field(
        {},
        description="Hashed table -> its rows, instead of `hash_rows` or of the schema file's "
        "number.",
    )
    memory_mb: int = Field(
        1_000,
        ge=100,
        description="Memory in MB that sorting and joining raw data may use before it spills to "
        "disk.",
    )
    attribution_s: dict[Name, Annotated[int, Field(ge=0)]] = Field(
        {},
        description="Task -> seconds to wait for its labels after the end of a window. 0 or not "
        "listed: the label stands with the event.",
    )
    late_labels: Literal["count", "correct"] = Field(
        "count",
        description="Labels that arrive after the release of their window. count: only count them; "
        "correct: learn them as positives with a later window.",
    )
    follow: FollowConfig | None = Field(
        None,
        description="Read files of a `table` source, or messages of `kafka`, as they arrive; null: "
        "the data are complete.",
    )
    synthetic: SyntheticConfig = Field(
        SyntheticConfig(), description="Settings of the source `synthetic`."
    )

    @property
    def delayed(self) -> dict[str, int]:
        """Return the tasks whose labels arrive after their events, with `attribution_s` of each."""
        delayed = {}
        for task, seconds in self.attribution_s.items():
            if seconds > 0:
                delayed[task] = seconds
        return delayed

    @model_validator(mode="after")
    def _check_follow(self) -> Self:
        if (self.source == "kafka") != bool(self.follow and self.follow.kafka):
            raise ValueError(
                "data.follow.kafka says where the events of the source 'kafka' are; set both, or "
                "neither"
            )
        if self.follow is None:
            return self

        if self.source not in ("table", "kafka"):
            raise ValueError(
                f"data.follow is set, but the source '{self.source}' has an end; set "
                "data.source=table, or remove data.follow"
            )
        if self.window.by != "time":
            raise ValueError(
                f"data.follow cuts windows by time, but data.window.by is '{self.window.by}'; set "
                "it to time"
            )
        if self.max_rows is not None:
            raise ValueError("data.follow has no end; remove data.max_rows")
        if bool(self.follow.labels) != bool(self.delayed):
            raise ValueError(
                "data.follow.labels says where labels come from, and data.attribution_s says which "
                "labels do; set both, or neither"
            )
        return self
