"""Any Parquet or CSV files, described by a schema file (docs/data.md)."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from exfm_ray.config.root import Config
from exfm_ray.data.arrow_types import is_list, is_number, is_text
from exfm_ray.data.sources.base import (
    RawSource,
    check_columns,
    read_csv,
    require_glob,
    sql_identifier,
    sql_literal,
)
from exfm_ray.data.sources.schema_file import TableFile, checked
from exfm_ray.errors import UserError
from exfm_ray.schema import Encoding, Kind, SparseFeature

UNITS = {
    "s": "round({} * 1000)::BIGINT",
    "ms": "{}::BIGINT",
    "us": "{}::BIGINT // 1000",
    "iso": "epoch_ms({}::TIMESTAMP)",
}
"""Unit -> SQL expression of a column's time in ms."""


def source(config: Config) -> RawSource:
    """The files that the schema file describes."""
    spec = checked(config)
    if spec.format == "json" or not spec.files:
        raise UserError(
            f"{config.data.schema_file}: a `table` source reads `files` of the format csv or "
            "parquet; `json` is for messages of kafka"
        )
    files: list[Path] = []
    for pattern in spec.patterns:
        files += require_glob(config.data.root, pattern)
    return described(spec, tuple(files))


def described(
    spec: TableFile,
    files: tuple[Path, ...],
    delayed: Container[str] = (),
) -> RawSource:
    """Files as a source.

    Args:
        spec: the schema file.
        files: the files, in event order.
        delayed: tasks of a followed stream whose labels come later; the files have no columns for
            them.
    """
    schema = spec.table_schema
    present = tuple(task for task in schema.tasks if task not in delayed)
    columns = schema.model_copy(update={"tasks": present})
    spec = spec.model_copy(update={"table_schema": columns})
    query = _csv_query(spec, files) if spec.format == "csv" else _parquet_query(spec, files)
    parts: tuple[str, ...] = ()
    if spec.sort:
        query = f"SELECT * EXCLUDE (place) FROM ({query}) ORDER BY event_time, place"
    else:
        parts = tuple(_table(spec, [path]) for path in files)
    return RawSource(
        schema=schema,
        files=files,
        query=query,
        ordered_only=spec.event_time is None,
        parts=parts,
        label_time_tasks=tuple(spec.label_time),
    )


def _table(spec: TableFile, files: Sequence[Path]) -> str:
    """A DuckDB table expression over files.

    The types of a CSV file come from the schema, those of Parquet from the files.
    """
    if spec.format == "csv":
        return read_csv(files, _csv_types(spec), spec.delimiter)
    names = ", ".join(sql_literal(path) for path in files)
    return f"read_parquet([{names}])"


def _csv_query(spec: TableFile, files: tuple[Path, ...]) -> str:
    def bag(feature: SparseFeature) -> str:
        return _split(spec, feature.name)

    columns = _select_list(spec, bag, numbers=())
    return f"SELECT {columns} FROM {_table(spec, files)}"


def _parquet_query(spec: TableFile, files: tuple[Path, ...]) -> str:
    """Types come from the files. They are checked against the schema before anything is read."""
    for path in files:
        file_schema = _parquet_schema(path)
        check_columns(path, _required_columns(spec), file_schema.names)
        _check_types(path, spec, file_schema)
    first = pq.read_schema(files[0])

    def bag(feature: SparseFeature) -> str:
        kind = first.field(feature.name).type
        if is_list(kind):
            return sql_identifier(feature.name)
        return _split(spec, feature.name)

    numbers = (*spec.table_schema.tasks, *spec.dense_names)
    columns = _select_list(spec, bag, numbers)
    return f"SELECT {columns} FROM {_table(spec, files)}"


def _parquet_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from None


def _split(spec: TableFile, column: str) -> str:
    """SQL expression of a list held as text."""
    name = sql_identifier(column)
    delimiter = sql_literal(spec.list_delimiter)
    return f"string_split({name}, {delimiter})"


def _select_list(
    spec: TableFile,
    bag: Callable[[SparseFeature], str],
    numbers: Container[str],
) -> str:
    """The select list: the names that `prepare` expects for the files' columns.

    Args:
        spec: the schema file.
        bag: gives the SQL expression of a list.
        numbers: columns that are cast to DOUBLE.
    """
    schema = spec.table_schema
    singles = [feature.name for feature in schema.features if feature.kind is Kind.SINGLE]
    selected = []
    for column in (*schema.tasks, *spec.dense_names, *singles):
        name = sql_identifier(column)
        selected.append(f"{name}::DOUBLE AS {name}" if column in numbers else name)
    for feature in schema.bags:
        name = sql_identifier(feature.name)
        selected.append(f"{bag(feature)} AS {name}")
    selected += _select_times(spec)
    if spec.domain:
        name = sql_identifier(spec.domain)
        selected.append(f"{name}::VARCHAR AS domain")
    if spec.example_id:
        name = sql_identifier(spec.example_id)
        selected.append(f"{name} AS example_id")
    if spec.sort:
        selected.append("row_number() OVER () AS place")
    return ", ".join(selected)


def _select_times(spec: TableFile) -> list[str]:
    """The event's time, and the times at which labels became known, all in ms."""
    if spec.event_time is None:
        return []
    to_ms = UNITS[spec.event_time.unit]
    event_time = to_ms.format(sql_identifier(spec.event_time.column))
    selected = [f"{event_time} AS event_time"]
    for task, column in spec.label_time.items():
        known = to_ms.format(sql_identifier(column))
        name = sql_identifier(f"known:{task}")
        selected.append(f"{known} AS {name}")
    return selected


def _required_columns(spec: TableFile) -> list[str]:
    """All columns that the files must have."""
    columns = [
        *spec.table_schema.tasks,
        *spec.feature_names,
        *spec.dense_names,
    ]
    if spec.event_time:
        columns.append(spec.event_time.column)
    if spec.domain:
        columns.append(spec.domain)
    if spec.example_id:
        columns.append(spec.example_id)
    return [*columns, *spec.label_time.values()]


def _csv_types(spec: TableFile) -> dict[str, str]:
    """SQL types from the schema. They are never detected: a value of another type is an error with
    its line."""
    types = dict.fromkeys(_required_columns(spec), "VARCHAR")
    for feature in spec.table_schema.features:
        if feature.kind is Kind.SINGLE and feature.encoding is Encoding.INDEX:
            types[feature.name] = "BIGINT"
    for column in (*spec.table_schema.tasks, *spec.dense_names):
        types[column] = "DOUBLE"
    if spec.example_id:
        types[spec.example_id] = "BIGINT"
    if spec.event_time:
        unit = spec.event_time.unit
        time_types = {"s": "DOUBLE", "iso": "TIMESTAMP"}
        time_type = time_types.get(unit, "BIGINT")
        for column in spec.time_columns:
            types[column] = time_type
    return types


class _Requirement(NamedTuple):
    """What a Parquet column must be, as a test of its type and in words."""

    fits: Callable[[pa.DataType], bool]
    words: str


def _check_types(
    path: Path,
    spec: TableFile,
    file_schema: pa.Schema,
) -> None:
    """Raise UserError for the first Parquet column whose type does not fit the schema file."""
    for column, requirement in _requirements(spec):
        kind = file_schema.field(column).type
        if not requirement.fits(kind):
            raise UserError(
                f"{path}: column '{column}' is {kind}, the schema file needs {requirement.words}; "
                "convert the column or change its declaration"
            )


def _requirements(spec: TableFile) -> list[tuple[str, _Requirement]]:
    """The requirement for each column of a Parquet file, in the order in which they are checked."""
    schema = spec.table_schema
    singles = [feature for feature in schema.features if feature.kind is Kind.SINGLE]
    requirements = []
    for column in (*schema.tasks, *spec.dense_names):
        requirements.append((column, _Requirement(is_number, "a number")))
    for feature in schema.bags:
        requirements.append((feature.name, _Requirement(_is_list_or_text, "a list, or text")))
    for feature in singles:
        requirements.append((feature.name, _Requirement(_is_flat, "one value")))
    for feature in singles:
        if feature.encoding is Encoding.INDEX:
            integer = _Requirement(pa.types.is_integer, "an integer")
            requirements.append((feature.name, integer))
    if spec.event_time:
        time = _time_requirement(spec.event_time.unit)
        for column in spec.time_columns:
            requirements.append((column, time))
    return requirements


def _time_requirement(unit: str) -> _Requirement:
    if unit == "iso":
        return _Requirement(_is_time_or_text, "a timestamp, or ISO 8601 text")
    return _Requirement(is_number, f"a number ({unit})")


def _is_flat(kind: pa.DataType) -> bool:
    nested = pa.types.is_nested(kind)
    return not nested


def _is_list_or_text(kind: pa.DataType) -> bool:
    return is_list(kind) or is_text(kind)


def _is_time_or_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind)) or is_text(kind)
