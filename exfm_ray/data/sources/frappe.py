"""Frappe (BARS split Frappe_x1): mobile app usage, label and ten categorical columns, no time.

train.csv comes first, in an order drawn from the seed. valid.csv and test.csv, if they exist, come
after it, so that the last windows are the benchmark's validation and test rows. The ids are
integers below 5,382 over all columns together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exfm_ray.config.root import Config
from exfm_ray.data.sources.base import RawSource, indexed, read_csv, require, sql_identifier
from exfm_ray.schema import Schema

COLUMNS = (
    "user",
    "item",
    "daytime",
    "weekday",
    "isweekend",
    "homework",
    "cost",
    "weather",
    "country",
    "city",
)
IDS = 5_400


def source(config: Config) -> RawSource:
    """A stream by rows."""
    files = _files(config.data.root)
    types = dict.fromkeys(COLUMNS, "BIGINT") | {"label": "DOUBLE"}
    tables = tuple(read_csv([path], types) for path in files)
    features = tuple(indexed(column, IDS) for column in COLUMNS)
    return RawSource(
        schema=Schema(features=features, tasks=("label",), group_by="user"),
        files=files,
        query=_query(tables, config.seed),
        ordered_only=True,
        parts=tables,
        seeded=True,
    )


def _files(root: Path) -> tuple[Path, ...]:
    """The training file, then the validation and test files that exist."""
    files = [require(root, "train.csv")]
    for name in ("valid.csv", "test.csv"):
        path = root / name
        if path.is_file():
            files.append(path)
    return tuple(files)


def _query(tables: Sequence[str], seed: int) -> str:
    parts = []
    for number, table in enumerate(tables):
        part = f"(SELECT *, {number} AS part, row_number() OVER () AS place FROM {table})"
        parts.append(part)
    union = " UNION ALL ".join(parts)
    names = [sql_identifier(column) for column in COLUMNS]
    columns = ", ".join(names)
    # md5 yields the same order in every version of the database.
    return f"SELECT label, {columns} FROM ({union}) ORDER BY part, md5('{seed}:' || place), place"
