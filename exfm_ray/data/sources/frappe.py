"""Frappe (BARS split Frappe_x1): mobile app usage, label and ten categorical columns, no time.

train.csv first, in an order drawn from the seed; valid.csv and test.csv after it where they are
there, so that the last windows are the benchmark's validation and test rows. The ids are integers
below 5,382 over all columns together.
"""

from __future__ import annotations

from exfm_ray.config.root import Config
from exfm_ray.data.sources.base import RawSource, indexed, read_csv, require
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
    root = config.data.root
    files = [
        require(root, "train.csv"),
        *(p for p in (root / "valid.csv", root / "test.csv") if p.is_file()),
    ]
    tables = tuple(
        read_csv([path], dict.fromkeys(COLUMNS, "BIGINT") | {"label": "DOUBLE"}) for path in files
    )
    parts = " UNION ALL ".join(
        f"(SELECT *, {part} AS part, row_number() OVER () AS place FROM {table})"
        for part, table in enumerate(tables)
    )
    columns = ", ".join(f'"{c}"' for c in COLUMNS)
    # md5 gives the same order in every version of the database.
    query = f"SELECT label, {columns} FROM ({parts}) ORDER BY part, md5('{config.seed}:' || place), place"
    schema = Schema(
        features=tuple(indexed(c, IDS) for c in COLUMNS), tasks=("label",), group_by="user"
    )
    return RawSource(
        schema=schema, files=tuple(files), query=query, ordered_only=True, parts=tables, seeded=True
    )
