"""Criteo display ads (the Kaggle training file): tab separated, no header, in order but without
times."""

from __future__ import annotations

from exfm_ray.config.root import Config
from exfm_ray.data.sources.base import PLAIN, RawSource, csv_columns, require, sql_literal
from exfm_ray.schema import DenseFeature, Schema, SparseFeature

INTEGERS = tuple(f"I{i}" for i in range(1, 14))
# Distinct values of C1..C26 in the whole file, rounded up: small columns get small tables.
DISTINCT = (
    1_500,
    600,
    10**7,
    10**7,
    400,
    50,
    12_600,
    700,
    20,
    94_000,
    5_700,
    10**7,
    3_200,
    50,
    15_000,
    10**7,
    20,
    5_700,
    2_200,
    20,
    10**7,
    30,
    30,
    287_000,
    110,
    143_000,
)
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))


def source(config: Config) -> RawSource:
    """A stream by rows; event_time is the row's number."""
    path = require(config.data.root, "train.txt")
    types = {"click": "DOUBLE"}
    types |= dict.fromkeys(INTEGERS, "DOUBLE")
    types |= dict.fromkeys(CATEGORIES, "VARCHAR")
    query = (
        f"SELECT * FROM read_csv({sql_literal(path)}, {PLAIN}, header=false, delim='\t', "
        f"quote='', escape='', nullstr='', columns={csv_columns(types)})"
    )

    features = []
    for name, distinct in zip(CATEGORIES, DISTINCT, strict=True):
        # Four rows for each value keep collisions of the small columns rare.
        rows = min(config.data.hash_rows, 4 * distinct)
        features.append(SparseFeature(name=name, rows=rows))
    dense = [DenseFeature(name=name, transform="log1p") for name in INTEGERS]
    return RawSource(
        schema=Schema(features=tuple(features), dense=tuple(dense), tasks=("click",)),
        files=(path,),
        query=query,
        ordered_only=True,
    )
