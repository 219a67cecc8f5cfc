"""What every raw source provides: a schema and a DuckDB query whose columns are the schema's raw
values, in event order."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exfm_ray.data.prepare.sequence_feature import History
from exfm_ray.errors import UserError, nearest
from exfm_ray.schema import Encoding, Kind, Schema, SparseFeature
from exfm_ray.storage.atomic import short_hash

HEAD_BYTES = 65_536
# Options of DuckDB's read_csv: types are not detected, and buffers are small, because DuckDB holds
# several buffers however small the file is.
PLAIN = "auto_detect=false, buffer_size=8388608"


@dataclass(frozen=True)
class RawSource:
    """A raw data set.

    Attributes:
        schema: what the examples will be.
        files: the files read. They name the source in messages, and their fingerprints are among
            the stream's settings.
        query: yields one column per task, single-valued feature, multi-valued feature and dense
            feature, by their names. Optional columns: `event_time` (BIGINT, ms; default: the
            event's number), `domain` (a name; default: the first domain), `example_id` (BIGINT;
            default: a running number) and `event_key` (anything hashable: identifies an event).
        history: a sequence feature that `prepare` builds; it is not a column of the query.
        ordered_only: there is no time, only an order.
        parts: a DuckDB table expression for each file, in event order. Empty if the events do not
            follow one another file by file.
        seeded: the query depends on the config's seed.
        label_time_tasks: tasks for which the query has a column `known:<task>` (BIGINT, ms): when a
            label of 1 became known.
    """

    schema: Schema
    files: tuple[Path, ...]
    query: str
    history: History | None = None
    ordered_only: bool = False
    parts: tuple[str, ...] = ()
    seeded: bool = False
    label_time_tasks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the source in a message: its file or files."""
        if not self.files:
            return "the source"
        first = str(self.files[0])
        if len(self.files) == 1:
            return first
        return f"{first} (or another of {len(self.files)} files)"

    def fingerprint(self) -> list[list[str | int]]:
        """Name, size and a digest of both ends of each file.

        Copies have the same fingerprint; other files have another one.
        """
        entries: list[list[str | int]] = []
        for path in self.files:
            size = path.stat().st_size
            entries.append([path.name, size, _digest_of_ends(path)])
        return entries


def _digest_of_ends(path: Path) -> str:
    size = path.stat().st_size
    tail_start = max(0, size - HEAD_BYTES)
    with path.open("rb") as handle:
        head = handle.read(HEAD_BYTES)
        handle.seek(tail_start)
        tail = handle.read(HEAD_BYTES)
    return short_hash([head.hex(), tail.hex()])


def sql_literal(value: object) -> str:
    """A value as an SQL string literal."""
    text = str(value)
    escaped = text.replace("'", "''")
    return f"'{escaped}'"


def sql_identifier(column: str) -> str:
    """A column's name as an SQL identifier."""
    escaped = column.replace('"', '""')
    return f'"{escaped}"'


def require(root: Path, file: str) -> Path:
    """`root / file`; UserError with the nearest existing name if there is no such file."""
    path = root / file
    if path.is_file():
        return path
    names = []
    problem = f"the folder {root} does not exist"
    if root.is_dir():
        names = sorted(entry.name for entry in root.iterdir())
        problem = "no such file"
    raise UserError(
        f"{path}: {problem}.{nearest(file, names)} Set data.root to the folder that holds {file}"
    )


def require_glob(root: Path, pattern: str) -> tuple[Path, ...]:
    """The files below `root` that match, ordered by name; UserError if there are none."""
    matches = [path for path in root.glob(pattern) if path.is_file()]
    if not matches:
        missing = root / pattern
        raise UserError(f"{missing}: no such file; set data.root to the folder that holds it")
    matches.sort()
    return tuple(matches)


def header(path: Path, delimiter: str = ",") -> list[str]:
    """The column names in a CSV file's first line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            rows = csv.reader(handle, delimiter=delimiter)
            return next(rows)
    except StopIteration:
        raise UserError(
            f"{path}: the file is empty; a line of column names is expected first"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); convert it first") from None


def check_columns(
    path: Path,
    required: Iterable[str],
    actual: Sequence[str],
) -> None:
    """Raise UserError with the file, the first missing column and the nearest existing one."""
    for column in required:
        if column not in actual:
            raise UserError(
                f"{path}: no column '{column}'.{nearest(column, actual)} "
                f"The file has: {', '.join(actual)}"
            )


def read_csv(
    files: Sequence[Path],
    types: dict[str, str],
    delimiter: str = ",",
) -> str:
    """A DuckDB table expression over CSV files with a header.

    Args:
        files: the files; all must have the same header.
        types: column -> SQL type. Other columns are text; no type is detected.
        delimiter: between the values of a line.

    Raises:
        UserError: a column of `types` is missing, or the headers differ.
    """
    columns = header(files[0], delimiter)
    check_columns(files[0], types, columns)
    for path in files[1:]:
        other = header(path, delimiter)
        if other != columns:
            raise UserError(
                f"{path}: its columns differ from those of {files[0]}; "
                "give all files the same header"
            )
    declared = csv_columns({column: types.get(column, "VARCHAR") for column in columns})
    names = ", ".join(sql_literal(path) for path in files)
    return (
        f"read_csv([{names}], {PLAIN}, header=true, delim={sql_literal(delimiter)}, "
        f"quote='\"', escape='\"', nullstr='', columns={declared})"
    )


def csv_columns(types: Mapping[str, str]) -> str:
    """The option `columns` of DuckDB's read_csv."""
    pairs = []
    for column, kind in types.items():
        pairs.append(f"{sql_literal(column)}: {sql_literal(kind)}")
    return "{" + ", ".join(pairs) + "}"


def with_table_rows(schema: Schema, rows: Mapping[str, int]) -> Schema:
    """Resize hashed tables of a schema.

    Args:
        schema: the schema of the source.
        rows: table -> number of rows. Features that share the table follow.

    Raises:
        UserError: there is no such table, or its rows are ids and not hashes.
    """
    features = {feature.name: feature for feature in schema.features}
    for table in rows:
        if table not in schema.tables:
            raise _unknown_table(table, schema)
        if table not in features or features[table].encoding is Encoding.INDEX:
            raise UserError(
                f"setting 'data.table_rows.{table}': the rows of this table are the ids "
                "themselves, not hashes of them; remove it"
            )

    resized = []
    for feature in schema.features:
        table = feature.table or feature.name
        size = rows.get(table, feature.rows)
        copy = feature.model_copy(update={"rows": size})
        resized.append(copy)
    dumped = schema.model_dump()
    return Schema.model_validate(dumped | {"features": resized})


def _unknown_table(table: str, schema: Schema) -> UserError:
    owners = {feature.name: feature.table for feature in schema.features}
    owner = owners.get(table)
    if owner:
        way_out = f" It shares that of '{owner}'."
    else:
        names = ", ".join(schema.tables)
        suggestion = nearest(table, schema.tables)
        way_out = suggestion or f" There are {names}."
    return UserError(f"setting 'data.table_rows': no embedding table is named '{table}'.{way_out}")


def hashed(names: Iterable[str], rows: int) -> list[SparseFeature]:
    """Single-valued features hashed into tables of `rows` rows."""
    features = []
    for name in names:
        feature = SparseFeature(name=name, rows=rows)
        features.append(feature)
    return features


def indexed(feature: str, values: int) -> SparseFeature:
    """A single-valued feature of integers in [0, values)."""
    return SparseFeature(
        name=feature,
        encoding=Encoding.INDEX,
        rows=values + 1,
    )


def sequence(
    feature: str,
    of: SparseFeature,
    length: int,
) -> SparseFeature:
    """A sequence of up to `length` values of another feature, in that feature's table."""
    return SparseFeature(
        name=feature,
        kind=Kind.SEQUENCE,
        encoding=of.encoding,
        rows=of.rows,
        table=of.name,
        max_length=length,
    )
