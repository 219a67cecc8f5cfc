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

BATCH_ROWS = 16_384  # fixed: the normaliser's rounding, and so the bytes written, depend on it


def read(
    source: RawSource,
    memory_mb: int,
    scratch: Path,
) -> Generator[pa.Table, None, None]:
    """Tables of BATCH_ROWS rows (the last one shorter) of the source's query, in event order.

    Sorts and joins that exceed `memory_mb` go to `scratch`, which is removed afterwards. One
    thread, so that the same input gives the same rows in the same order. UserError names file,
    line, column and value of what cannot be read.
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
    """Events in each of the source's parts."""
    try:
        with duckdb.connect() as connection:
            return [
                int(row[0])
                for part in source.parts
                for row in connection.sql(f"SELECT count(*) FROM {part}").fetchall()
            ]
    except duckdb.Error as error:
        raise explain(error, source, memory_mb) from None


def explain(
    error: Exception,
    source: RawSource,
    memory_mb: int,
) -> UserError:
    """What the database says, in one line a user can act on."""
    message = str(error)
    if "Out of Memory" in message or isinstance(error, duckdb.OutOfMemoryException):
        return UserError(
            f"{source.name}: sorting needs more than data.memory_mb = {memory_mb}; raise it ({message.splitlines()[0]})"
        )
    line = re.search(r"CSV Error on Line: (\d+)", message)
    if not line:
        return UserError(f"{source.name}: cannot be read: {message.splitlines()[0]}")
    file = re.search(r"^\s*file = (.+)$", message, re.MULTILINE)
    return UserError(f"{file[1] if file else source.name}, line {line[1]}: {_csv_fault(message)}")


def _csv_fault(message: str) -> str:
    bad = re.search(
        r'Error when converting column "(.*?)"\. Could not convert string "(.*?)" to \'(.*?)\'',
        message,
        re.DOTALL,
    )
    if bad:
        wanted = {"DOUBLE": "a number", "BIGINT": "an integer", "UBIGINT": "an integer"}.get(
            bad[3], f"a {bad[3].lower()}"
        )
        return f"column '{bad[1]}' has the value '{bad[2]}', which is not {wanted}; correct it or leave the line out"
    width = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", message)
    if width:
        return (
            f"{width[2]} columns where {width[1]} are expected; correct the line, or the delimiter"
        )
    if "unicode" in message or "utf-8" in message:
        return "not UTF-8 text; convert the file first"
    if "unterminated quote" in message:
        return "a quote is opened and never closed; correct the line"
    return "; ".join(m.strip() for m in message.splitlines()[1:4] if m.strip())
