"""The schema file: what the columns of a user's own files or messages mean (docs/data.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from exfm_ray.base import FrozenModel, RelativePattern
from exfm_ray.config.root import Config
from exfm_ray.errors import UserError, nearest
from exfm_ray.schema import Schema


class EventTime(FrozenModel):
    """The column with an event's time, and its unit: seconds, milliseconds or microseconds since
    the epoch, or ISO 8601 in UTC."""

    column: str
    unit: Literal["s", "ms", "us", "iso"] = "ms"


class TableFile(FrozenModel):
    """The schema file. Feature, dense and task names are the files' column names."""

    format: Literal["csv", "parquet", "json"] = Field(description="json: messages of kafka")
    files: RelativePattern | tuple[RelativePattern, ...] = Field(
        (),
        description="file names or globs below data.root; read in the order given, "
        "the files of a glob in the order of their names",
    )
    delimiter: str = Field(",", min_length=1, max_length=1)
    list_delimiter: str = Field(
        "|",
        min_length=1,
        description="between the values of a multi-valued or sequence feature held as text",
    )
    event_time: EventTime | None = None
    domain: str | None = None
    example_id: str | None = None
    label_time: dict[str, str] = Field(
        {},
        description="task -> column with the time at which its label became known, "
        "in the unit of event_time",
    )
    sort: bool = False
    table_schema: Schema = Field(alias="schema")

    @property
    def patterns(self) -> tuple[str, ...]:
        """Names or globs of the files."""
        if isinstance(self.files, str):
            return (self.files,)
        return self.files

    @property
    def dense_names(self) -> list[str]:
        """Names of the dense features."""
        features = self.table_schema.dense
        return [feature.name for feature in features]

    @property
    def feature_names(self) -> list[str]:
        """Names of the sparse features, bags included."""
        features = self.table_schema.features
        return [feature.name for feature in features]

    @property
    def time_columns(self) -> list[str]:
        """Columns with times: the event's, and those at which labels became known."""
        columns = []
        if self.event_time:
            columns.append(self.event_time.column)
        columns += self.label_time.values()
        return columns


def load(file: Path | None) -> TableFile:
    """Read a schema file.

    Raises:
        UserError: names the wrong key and the nearest known one.
    """
    if file is None:
        raise UserError(
            "setting 'data.schema_file' is missing: a `table` source needs one; "
            "docs/data.md has an example"
        )
    try:
        tree = yaml.safe_load(file.read_text())
        return TableFile.model_validate(tree)
    except FileNotFoundError:
        raise UserError(f"{file}: no such schema file; correct data.schema_file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    except ValidationError as error:
        messages = [_explain(details) for details in error.errors()]
        raise UserError(f"{file}: {'; '.join(messages)}") from None


def _explain(error: Any) -> str:
    """One error of pydantic in words."""
    location = error["loc"]
    key = ".".join(str(part) for part in location)
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        return f"key '{key}': {message}"
    unknown = str(location[-1])
    suggestion = nearest(unknown, _known_keys())
    return f"unknown key '{key}'.{suggestion} docs/data.md lists the keys."


def _known_keys() -> list[str]:
    """All keys of a schema file, whatever their level."""
    tree = TableFile.model_json_schema()
    nested = tree["$defs"].values()
    keys: set[str] = set()
    for node in (tree, *nested):
        properties = node.get("properties", {})
        keys.update(properties)
    return sorted(keys)


def checked(config: Config) -> TableFile:
    """Read the schema file of a config and check that it is consistent.

    Raises:
        UserError: the file cannot be read, or contradicts itself.
    """
    spec = load(config.data.schema_file)
    file = config.data.schema_file
    tasks = spec.table_schema.tasks
    domains = spec.table_schema.domains
    leaks = set(tasks) & {*spec.feature_names, *spec.dense_names}
    if leaks:
        raise UserError(
            f"{file}: '{min(leaks)}' is a task and a feature: "
            "the answer would be among the inputs; drop one"
        )
    if spec.domain is None and len(domains) > 1:
        raise UserError(
            f"{file}: {len(domains)} domains but no `domain` column to distinguish them; "
            "name one, or keep one domain"
        )
    for task in spec.label_time:
        if task not in tasks:
            raise UserError(
                f"{file}: `label_time` names '{task}', which is no task.{nearest(task, tasks)}"
            )
    if spec.event_time is None:
        if spec.sort:
            raise UserError(f"{file}: `sort: true` needs an `event_time`")
        if spec.label_time:
            raise UserError(f"{file}: `label_time` needs an `event_time`")
    return spec
