"""Any Parquet or CSV files, described by a schema file (docs/data.md)."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import Field, ValidationError

from exfm_ray.base import FrozenModel, RelativePattern
from exfm_ray.config.root import Config
from exfm_ray.data.sources.base import (
    RawSource,
    check_columns,
    read_csv,
    require_glob,
    sql_identifier,
    sql_literal,
)
from exfm_ray.errors import UserError, nearest
from exfm_ray.schema import Encoding, Kind, Schema, SparseFeature

UNITS = {
    "s": "round({} * 1000)::BIGINT",
    "ms": "{}::BIGINT",
    "us": "{}::BIGINT // 1000",
    "iso": "epoch_ms({}::TIMESTAMP)",
}


class EventTime(FrozenModel):
    """Which column tells the time, and in what: seconds, milliseconds, microseconds since the
    epoch, or ISO 8601 in UTC."""

    column: str
    unit: Literal["s", "ms", "us", "iso"] = "ms"


class TableFile(FrozenModel):
    """The schema file. Feature, dense and task names are the files' column names."""

    format: Literal["csv", "parquet", "json"] = Field(description="json: messages of kafka")
    files: RelativePattern | tuple[RelativePattern, ...] = Field(
        (),
        description="file names or globs below data.root; read in the order given, the files of a glob in the order of their names",
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
        description="task -> column that says when its label became known, in the unit of event_time",
    )
    sort: bool = False
    table_schema: Schema = Field(alias="schema")


def load(file: Path | None) -> TableFile:
    """Read a schema file; UserError names the key at fault and the nearest known one."""
    if file is None:
        raise UserError(
            "setting 'data.schema_file' is missing: a `table` source needs one; docs/data.md has an example"
        )
    try:
        tree = yaml.safe_load(file.read_text())
        return TableFile.model_validate(tree)
    except FileNotFoundError:
        raise UserError(f"{file}: no such schema file; correct data.schema_file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    except ValidationError as error:
        raise UserError(
            f"{file}: " + "; ".join(_explain(e["type"], e["loc"], e["msg"]) for e in error.errors())
        ) from None


def _explain(
    kind: str,
    place: tuple[int | str, ...],
    message: str,
) -> str:
    key = ".".join(str(p) for p in place)
    if kind != "extra_forbidden":
        return f"key '{key}': {message.removeprefix('Value error, ')}"
    tree = TableFile.model_json_schema()
    known = {k for node in (tree, *tree["$defs"].values()) for k in node.get("properties", {})}
    return (
        f"unknown key '{key}'."
        + nearest(str(place[-1]), sorted(known))
        + " docs/data.md lists the keys."
    )


def source(config: Config) -> RawSource:
    """The files that the schema file describes."""
    spec = checked(config)
    if spec.format == "json" or not spec.files:
        raise UserError(
            f"{config.data.schema_file}: a `table` source reads `files` of the format csv or parquet; `json` is of kafka's messages"
        )
    return described(
        spec,
        tuple(
            path for pattern in patterns(spec) for path in require_glob(config.data.root, pattern)
        ),
    )


def patterns(spec: TableFile) -> tuple[str, ...]:
    """Names or globs of the files."""
    return (spec.files,) if isinstance(spec.files, str) else spec.files


def checked(config: Config) -> TableFile:
    """The schema file, once it is seen to make sense."""
    spec = load(config.data.schema_file)
    schema = spec.table_schema
    leaks = {*(f.name for f in schema.features), *(d.name for d in schema.dense)} & set(
        schema.tasks
    )
    if leaks:
        raise UserError(
            f"{config.data.schema_file}: '{min(leaks)}' is a task and a feature: the answer would be among the inputs; drop one"
        )
    if spec.domain is None and len(schema.domains) > 1:
        raise UserError(
            f"{config.data.schema_file}: {len(schema.domains)} domains but no `domain` column to tell them; name one, or keep one domain"
        )
    for task in spec.label_time:
        if task not in schema.tasks:
            raise UserError(
                f"{config.data.schema_file}: `label_time` names '{task}', which is no task.{nearest(task, schema.tasks)}"
            )
    for key, used in (("sort: true", spec.sort), ("label_time", bool(spec.label_time))):
        if used and spec.event_time is None:
            raise UserError(f"{config.data.schema_file}: `{key}` needs an `event_time`")
    return spec


def described(
    spec: TableFile,
    files: tuple[Path, ...],
    awaited: Container[str] = (),
) -> RawSource:
    """Files as a source; those of a followed stream have no columns for the tasks in `awaited`,
    whose labels come later."""
    schema = spec.table_schema
    there = schema.model_copy(
        update={"tasks": tuple(task for task in schema.tasks if task not in awaited)}
    )
    spec = spec.model_copy(update={"table_schema": there})
    query = _csv(spec, files) if spec.format == "csv" else _parquet(spec, files)
    if spec.sort:
        query = f"SELECT * EXCLUDE (place) FROM ({query}) ORDER BY event_time, place"
    parts = () if spec.sort else tuple(_table(spec, [path]) for path in files)
    return RawSource(
        schema=schema,
        files=files,
        query=query,
        ordered_only=spec.event_time is None,
        parts=parts,
        label_time_tasks=tuple(spec.label_time),
    )


def _table(spec: TableFile, files: Sequence[Path]) -> str:
    """A DuckDB table expression over files: the types of a CSV file come from the schema, those of
    Parquet from the files."""
    if spec.format == "csv":
        return read_csv(files, _csv_types(spec), spec.delimiter)
    return f"read_parquet([{', '.join(sql_literal(path) for path in files)}])"


def _columns(
    spec: TableFile,
    bag: Callable[[SparseFeature], str],
    casts: dict[str, str],
) -> str:
    """The select list: our names for the files' columns; `casts` maps a column to a type, `bag`
    gives a list's expression."""
    schema = spec.table_schema
    plain = [
        *schema.tasks,
        *(d.name for d in schema.dense),
        *(f.name for f in schema.features if f.kind is Kind.SINGLE),
    ]
    chosen = [
        f"{sql_identifier(c)}::{casts[c]} AS {sql_identifier(c)}"
        if c in casts
        else sql_identifier(c)
        for c in plain
    ]
    chosen += [f"{bag(f)} AS {sql_identifier(f.name)}" for f in schema.bags]
    if spec.event_time:
        chosen.append(
            UNITS[spec.event_time.unit].format(sql_identifier(spec.event_time.column))
            + " AS event_time"
        )
        chosen += [
            f"{UNITS[spec.event_time.unit].format(sql_identifier(column))} AS {sql_identifier('known:' + task)}"
            for task, column in spec.label_time.items()
        ]
    if spec.domain:
        chosen.append(f"{sql_identifier(spec.domain)}::VARCHAR AS domain")
    if spec.example_id:
        chosen.append(f"{sql_identifier(spec.example_id)} AS example_id")
    if spec.sort:
        chosen.append("row_number() OVER () AS place")
    return ", ".join(chosen)


def _wanted(spec: TableFile) -> list[str]:
    """All columns that the files must have."""
    schema = spec.table_schema
    special = [
        spec.event_time.column if spec.event_time else None,
        spec.domain,
        spec.example_id,
        *spec.label_time.values(),
    ]
    return [
        *schema.tasks,
        *(f.name for f in schema.features),
        *(d.name for d in schema.dense),
        *(c for c in special if c),
    ]


def _csv_types(spec: TableFile) -> dict[str, str]:
    """Types come from the schema, never from a guess: a value of another type is an error with its
    line."""
    schema = spec.table_schema
    types = dict.fromkeys(_wanted(spec), "VARCHAR")
    types |= {
        f.name: "BIGINT"
        for f in schema.features
        if f.encoding is Encoding.INDEX and f.kind is Kind.SINGLE
    }
    types |= dict.fromkeys([*schema.tasks, *(d.name for d in schema.dense)], "DOUBLE")
    if spec.example_id:
        types[spec.example_id] = "BIGINT"
    if spec.event_time:
        kind = {"s": "DOUBLE", "iso": "TIMESTAMP"}.get(spec.event_time.unit, "BIGINT")
        types |= dict.fromkeys([spec.event_time.column, *spec.label_time.values()], kind)
    return types


def _csv(spec: TableFile, files: tuple[Path, ...]) -> str:
    return f"SELECT {_columns(spec, lambda f: _split(spec, f.name), {})} FROM {_table(spec, files)}"


def _split(spec: TableFile, column: str) -> str:
    return f"string_split({sql_identifier(column)}, {sql_literal(spec.list_delimiter)})"


def _parquet(spec: TableFile, files: tuple[Path, ...]) -> str:
    """Types come from the files, and are checked against the schema before anything is read."""
    for path in files:
        try:
            there = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({error})") from None
        check_columns(path, _wanted(spec), there.names)
        _check_types(path, spec, there)
    first = pq.read_schema(files[0])

    def bag(feature: SparseFeature) -> str:
        return (
            sql_identifier(feature.name)
            if _is_list(first.field(feature.name).type)
            else _split(spec, feature.name)
        )

    numbers = [*spec.table_schema.tasks, *(d.name for d in spec.table_schema.dense)]
    return (
        f"SELECT {_columns(spec, bag, dict.fromkeys(numbers, 'DOUBLE'))} FROM {_table(spec, files)}"
    )


def _check_types(
    path: Path,
    spec: TableFile,
    there: pa.Schema,
) -> None:
    schema = spec.table_schema
    wanted: list[tuple[str, Callable[[pa.DataType], bool], str]] = [
        *((c, _is_number, "a number") for c in (*schema.tasks, *(d.name for d in schema.dense))),
        *((f.name, lambda t: _is_list(t) or _is_text(t), "a list, or text") for f in schema.bags),
        *(
            (f.name, lambda t: not pa.types.is_nested(t), "one value")
            for f in schema.features
            if f.kind is Kind.SINGLE
        ),
        *(
            (f.name, pa.types.is_integer, "an integer")
            for f in schema.features
            if f.kind is Kind.SINGLE and f.encoding is Encoding.INDEX
        ),
    ]
    if spec.event_time:
        times = [spec.event_time.column, *spec.label_time.values()]
        if spec.event_time.unit == "iso":
            wanted += [
                (
                    c,
                    lambda t: pa.types.is_timestamp(t) or _is_text(t),
                    "a timestamp, or ISO 8601 text",
                )
                for c in times
            ]
        else:
            wanted += [(c, _is_number, f"a number ({spec.event_time.unit})") for c in times]
    for column, fits, what in wanted:
        kind = there.field(column).type
        if not fits(kind):
            raise UserError(
                f"{path}: column '{column}' is {kind}, the schema file needs {what}; convert the column or change its declaration"
            )


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
