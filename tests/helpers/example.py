"""A small random stream with every kind of feature, for all tests."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from exfm_ray.data.stream import EventStream, StreamWriter
from exfm_ray.schema import DenseFeature, Kind, Schema, SparseFeature
from exfm_ray.storage.remote import AnyPath

SCHEMA = Schema(
    features=(
        SparseFeature(name="user", rows=101),
        SparseFeature(name="ad", rows=51),
        SparseFeature(name="hour", rows=25),
        SparseFeature(name="keywords", kind=Kind.MULTI, rows=20, max_length=3),
        SparseFeature(name="clicked_ads", kind=Kind.SEQUENCE, rows=51, table="ad", max_length=5),
    ),
    dense=(DenseFeature(name="age"), DenseFeature(name="price", transform="log1p")),
    tasks=("click", "conversion"),
    domains=("feed", "search", "stories"),
    group_by="user",
)


def make_rows(
    rows: int,
    seed: int,
    first_id: int = 0,
    schema: Schema = SCHEMA,
) -> pa.Table:
    """Return random packed rows of SCHEMA; the labels depend on user, ad, hour, domain and age."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.integers(0, f.rows, rows) for f in schema.single], axis=1)
    ids[:, -1] = 1 + rng.choice(len(schema.domains), rows, p=[0.6, 0.3, 0.1])
    dense = rng.normal(size=(rows, len(schema.dense))).astype(np.float32)
    logit = (
        np.sin(ids[:, 0]) + np.cos(ids[:, 1]) * np.sin(ids[:, 2] / 4) + dense[:, 0] - ids[:, -1] / 2
    )
    click = rng.random(rows) < 1 / (1 + np.exp(-logit))
    conversion = click & (rng.random(rows) < 0.4)
    lists = {
        f.name: [rng.integers(0, f.rows, rng.integers(0, f.max_length + 1)) for _ in range(rows)]
        for f in schema.bags
    }
    labels = np.stack([click, conversion], axis=1).astype(np.float32)
    return pa.table(
        {
            "example_id": np.arange(first_id, first_id + rows, dtype=np.int64),
            "event_time": np.arange(first_id, first_id + rows, dtype=np.int64),
            "domain": (ids[:, -1] - 1).astype(np.int32),
            "labels": pa.FixedSizeListArray.from_arrays(
                pa.array(labels.ravel()), len(schema.tasks)
            ),
            "sparse": pa.FixedSizeListArray.from_arrays(
                pa.array(ids.astype(np.int32).ravel()), len(schema.single)
            ),
            "dense": pa.FixedSizeListArray.from_arrays(pa.array(dense.ravel()), len(schema.dense)),
            **{name: pa.array(values, pa.list_(pa.int32())) for name, values in lists.items()},
        }
    )


def make_stream(
    root: AnyPath,
    windows: int = 3,
    rows: int = 1000,
    fragment_rows: int = 400,
) -> EventStream:
    """Write and open a complete stream of random rows."""
    writer = StreamWriter(root, SCHEMA, {"made": "by the tests"}, fragment_rows)
    for window in range(windows):
        table = make_rows(rows, seed=window, first_id=window * rows)
        writer.write_window(window, window * rows, (window + 1) * rows, 0, [table] if rows else [])
    writer.finish({})
    return EventStream.open(root)
