"""What every raw source gives: a schema and a DuckDB query whose columns are the schema's raw
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
# Of DuckDB's read_csv: nothing is guessed, and buffers are small, for several are held however
# small the file is.
PLAIN = "auto_detect=false, buffer_size=8388608"


@dataclass(frozen=True)
class RawSource:
    """A raw data set.

    Attributes:
        schema: what the examples will be.
        files: the files read; they name the source in messages and are fingerprinted in the
            stream's settings.
        query: yields one column per task, single-valued feature, multi-valued feature and dense
            feature, by their names, and optionally `event_time` (BIGINT, ms; the event's number
            without), `domain` (a name; the first domain without), `example_id` (BIGINT; a running
            number without) and `event_key` (anything hashable: identifies an event).
        history: a sequence feature that the common path builds; not a column of the query.
        ordered_only: there is no time, only an order.
        parts: a DuckDB table expression for each file, in event order, where the events of the
            files follow one another.
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
        """The files in a message."""
        return (
            str(self.files[0])
            if len(self.files) == 1
            else f"{self.files[0]} (or another of {len(self.files)} files)"
        )

    def fingerprint(self) -> list[list[str | int]]:
        """Name, size and a digest of both ends of each file: survives copying, notices another
        file."""
        return [[path.name, path.stat().st_size, _ends(path)] for path in self.files]


def _ends(path: Path) -> str:
    with path.open("rb") as handle:
        head = handle.read(HEAD_BYTES)
        handle.seek(max(0, path.stat().st_size - HEAD_BYTES))
        return short_hash([head.hex(), handle.read(HEAD_BYTES).hex()])


def sql_literal(value: object) -> str:
    """A value as an SQL string literal."""
    return "'" + str(value).replace("'", "''") + "'"


def sql_identifier(column: str) -> str:
    """A column's name as an SQL identifier."""
    return '"' + column.replace('"', '""') + '"'


def require(root: Path, file: str) -> Path:
    """`root / file`, or UserError with the nearest name that is there."""
    path = root / file
    if not path.is_file():
        there = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
        missing = "no such file" if root.is_dir() else f"the folder {root} does not exist"
        raise UserError(
            f"{path}: {missing}.{nearest(file, there)} Set data.root to the folder that holds {file}"
        )
    return path


def require_glob(root: Path, pattern: str) -> tuple[Path, ...]:
    """The files below `root` that match, by name; UserError where none does."""
    found = tuple(sorted(p for p in root.glob(pattern) if p.is_file()))
    if not found:
        raise UserError(
            f"{root / pattern}: no such file; set data.root to the folder that holds it"
        )
    return found


def header(path: Path, delimiter: str = ",") -> list[str]:
    """The column names in a CSV file's first line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            return next(csv.reader(handle, delimiter=delimiter))
    except StopIteration:
        raise UserError(
            f"{path}: the file is empty; a line of column names is expected first"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); convert it first") from None


def check_columns(
    path: Path,
    wanted: Iterable[str],
    there: Sequence[str],
) -> None:
    """UserError naming the file, the column that is missing and the nearest one."""
    for column in wanted:
        if column not in there:
            raise UserError(
                f"{path}: no column '{column}'.{nearest(column, there)} The file has: {', '.join(there)}"
            )


def read_csv(
    files: Sequence[Path],
    types: dict[str, str],
    delimiter: str = ",",
) -> str:
    """A DuckDB table expression over CSV files with a header: the columns in `types`, others as
    text. Nothing is guessed."""
    columns = header(files[0], delimiter)
    check_columns(files[0], types, columns)
    for path in files[1:]:
        if header(path, delimiter) != columns:
            raise UserError(
                f"{path}: its columns differ from those of {files[0]}; give all files the same header"
            )
    declared = ", ".join(
        f"{sql_literal(c)}: {sql_literal(types.get(c, 'VARCHAR'))}" for c in columns
    )
    names = ", ".join(sql_literal(p) for p in files)
    return (
        f"read_csv([{names}], {PLAIN}, header=true, delim={sql_literal(delimiter)}, quote='\"', escape='\"', nullstr='', "
        f"columns={{{declared}}})"
    )


def with_table_rows(schema: Schema, rows: Mapping[str, int]) -> Schema:
    """The schema with other sizes of the hashed tables named in `rows`, also for the features that
    share them."""
    features = {f.name: f for f in schema.features}
    for table in rows:
        if table not in schema.tables:
            owner = features[table].table if table in features else None
            way_out = (
                f" It shares that of '{owner}'."
                if owner
                else nearest(table, schema.tables) or f" There are {', '.join(schema.tables)}."
            )
            raise UserError(
                f"setting 'data.table_rows': no embedding table is named '{table}'.{way_out}"
            )
        if table not in features or features[table].encoding is Encoding.INDEX:
            raise UserError(
                f"setting 'data.table_rows.{table}': the rows of this table are the ids themselves, not hashes of them; remove it"
            )
    sized = [
        f.model_copy(update={"rows": rows.get(f.table or f.name, f.rows)}) for f in schema.features
    ]
    return Schema.model_validate(schema.model_dump() | {"features": sized})


def hashed(names: Iterable[str], rows: int) -> list[SparseFeature]:
    """Single-valued features hashed into tables of `rows` rows."""
    return [SparseFeature(name=n, rows=rows) for n in names]


def indexed(feature: str, values: int) -> SparseFeature:
    """A single-valued feature of integers in [0, values)."""
    return SparseFeature(name=feature, encoding=Encoding.INDEX, rows=values + 1)


def sequence(
    feature: str,
    of: SparseFeature,
    length: int,
) -> SparseFeature:
    """A sequence of the values of another feature, in that feature's table."""
    return SparseFeature(
        name=feature,
        kind=Kind.SEQUENCE,
        encoding=of.encoding,
        rows=of.rows,
        table=of.name,
        max_length=length,
    )
