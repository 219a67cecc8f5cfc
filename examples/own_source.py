"""A source of your own: a JSON log that becomes an event stream. Nothing else to edit.

    python examples/own_source.py [RUN_FOLDER]

A source is a function from the config to a RawSource: a schema, the files, and one DuckDB query
whose columns are the schema's raw values in time order. The script writes a small log, prepares it
and prints what each window holds.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from exfm_ray.config.load import load_config
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.sources.base import RawSource, require, sql_literal
from exfm_ray.schema import DenseFeature, Schema, SparseFeature

EVENTS = 3_000
SECONDS_APART = 60
COLUMNS = {
    "ts": "BIGINT",
    "uid": "VARCHAR",
    "page": "VARCHAR",
    "dwell": "DOUBLE",
    "bought": "BOOLEAN",
}


def shop_log(config: Config) -> RawSource:
    """The source: `shop.jsonl` in data.root, one JSON object a line."""
    log = require(config.data.root, "shop.jsonl")
    types = ", ".join(f"{name}: {sql_literal(kind)}" for name, kind in COLUMNS.items())
    query = f"""
        SELECT ts * 1000 AS event_time, bought::DOUBLE AS bought,
               uid AS "user", page, dwell AS last_dwell
        FROM read_json({sql_literal(str(log))}, format='newline_delimited', columns={{{types}}})
        ORDER BY ts"""
    schema = Schema(
        features=(SparseFeature(name="user", rows=1_000), SparseFeature(name="page", rows=100)),
        dense=(DenseFeature(name="last_dwell", transform="log1p"),),
        tasks=("bought",),
        group_by="user",
    )
    return RawSource(schema=schema, files=(log,), query=query)


def write_log(path: Path) -> None:
    """A log of invented visits."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(EVENTS):
            visit = {
                "ts": 1_700_000_000 + number * SECONDS_APART,
                "uid": f"u{draw.randrange(300)}",
                "page": f"/item/{draw.randrange(50)}",
                "dwell": round(draw.expovariate(0.1), 2),
                "bought": draw.random() < 0.1,
            }
            file.write(json.dumps(visit) + "\n")


CONFIG = """
data:
  source: own_source:shop_log   # this module must be importable: its folder is on sys.path
  root: {root}
  window: {{by: time, length_s: 43200}}
run: {{dir: {runs}}}
"""


def main(folder: Path) -> None:
    """Prepare the log below `folder` and print its windows."""
    folder.mkdir(parents=True, exist_ok=True)
    write_log(folder / "shop.jsonl")
    settings = folder / "shop.yaml"
    settings.write_text(CONFIG.format(root=folder.absolute(), runs=folder.absolute() / "runs"))

    stream = prepare(load_config(settings))
    for index in stream.windows():
        window = stream.window(index)
        print(f"window {index}: {window.rows} events in {len(window.fragments)} fragment(s)")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_source"))
