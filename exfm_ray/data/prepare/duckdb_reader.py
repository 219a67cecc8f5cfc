"""DuckDB as the reader: joins and sorts larger than memory, rows streamed out in tables of one
size."""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator
from pathlib import Path

import duckdb
import pyarrow as pa

from exfm_ray.data.rebatch import regroup
from exfm_ray.data.sources.base import RawSource
from exfm_ray.errors import UserError

BATCH_ROWS = 16_384  # fixed: the normalizer's rounding, and so the bytes written, depend on it
TYPE_WORDS = {
    "DOUBLE": "a number",
    "BIGINT": "an integer",
    "UBIGINT": "an integer",
}
BAD_VALUE = re.compile(
    r'Error when converting column "(.*?)"\. Could not convert string "(.*?)" to \'(.*?)\'',
    re.DOTALL,
)
BAD_WIDTH = re.compile(r"Expected Number of Columns: (\d+) Found: (\d+)")


def read(
    source: RawSource,
    memory_mb: int,
    scratch: Path,
) -> Generator[pa.Table, None, None]:
    """Yield the rows of the source's query in event order, in tables of BATCH_ROWS rows.

    The last table may be shorter. One thread reads, so that the same input gives the same rows in
    the same order.

    Args:
        source: the raw source.
        memory_mb: sorts and joins that need more memory go to disk.
        scratch: folder for them, removed afterwards.

    Raises:
        UserError: names file, line, column and value of what cannot be read.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    settings: dict[str, str | bool | int | float | list[str]] = {
        "threads": 1,
        "memory_limit": f"{memory_mb}MB",
        "temp_directory": str(scratch),
        "preserve_insertion_order": True,
    }
    try:
        with duckdb.connect(config=settings) as connection:
            batches = connection.sql(source.query).to_arrow_reader(BATCH_ROWS)
            tables = (pa.Table.from_batches([batch]) for batch in batches)
            for table in regroup(tables, BATCH_ROWS):
                yield table.combine_chunks()
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise explain(error, source, memory_mb) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def part_rows(source: RawSource, memory_mb: int) -> list[int]:
    """Number of events in each of the source's parts."""
    counts = []
    try:
        with duckdb.connect() as connection:
            for part in source.parts:
                query = f"SELECT count(*) FROM {part}"
                result = connection.sql(query)
                ((count,),) = result.fetchall()
                counts.append(int(count))
    except duckdb.Error as error:
        raise explain(error, source, memory_mb) from None
    return counts


def explain(
    error: Exception,
    source: RawSource,
    memory_mb: int,
) -> UserError:
    """The database's error as one line that a user can act on."""
    message = str(error)
    summary = message.splitlines()[0]
    if "Out of Memory" in message or isinstance(error, duckdb.OutOfMemoryException):
        return UserError(
            f"{source.name}: sorting needs more than data.memory_mb = {memory_mb}; "
            f"raise it ({summary})"
        )
    line = re.search(r"CSV Error on Line: (\d+)", message)
    if not line:
        return UserError(f"{source.name}: cannot be read: {summary}")
    file = re.search(r"^\s*file = (.+)$", message, re.MULTILINE)
    name = file[1] if file else source.name
    return UserError(f"{name}, line {line[1]}: {_explain_csv(message)}")


def _explain_csv(message: str) -> str:
    """What is wrong with a line of a CSV file, and the way out."""
    value = BAD_VALUE.search(message)
    if value:
        column, text, kind = value.groups()
        expected = TYPE_WORDS.get(kind, f"a {kind.lower()}")
        return (
            f"column '{column}' has the value '{text}', which is not {expected}; "
            "correct it or leave the line out"
        )
    width = BAD_WIDTH.search(message)
    if width:
        expected, actual = width.groups()
        return f"{actual} columns where {expected} are expected; correct the line, or the delimiter"
    if "unicode" in message or "utf-8" in message:
        return "not UTF-8 text; convert the file first"
    if "unterminated quote" in message:
        return "a quote is opened and never closed; correct the line"
    details = [line.strip() for line in message.splitlines()[1:4]]
    return "; ".join(line for line in details if line)
