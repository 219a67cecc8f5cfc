"""Counts of shared rows against plain Python, the estimate for large tables against the full count,
and their way into the manifest."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from exfm_ray.config.root import Config
from exfm_ray.data.prepare.encode import encode_bag, encode_values
from exfm_ray.data.prepare.hash_collisions import Collisions
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.schema import Encoding, Kind, Schema, SparseFeature
from exfm_ray.storage.atomic import read_json

MakeConfig = Callable[..., Config]
WORD = SparseFeature(name="word", rows=12)
WORDS = SparseFeature(name="words", kind=Kind.MULTI, rows=12, table="word", max_length=9)
NUMBER = SparseFeature(name="number", rows=7)
CITY = SparseFeature(name="city", rows=50, encoding=Encoding.INDEX)
SCHEMA = Schema(features=(WORD, WORDS, NUMBER, CITY), tasks=("click",))
BATCHES = st.lists(
    st.lists(
        st.tuples(
            st.none() | st.sampled_from("abcdefghij"),
            st.none() | st.integers(-9, 9),
            st.lists(st.sampled_from("abcdefghij"), max_size=4),
        ),
        max_size=20,
    ),
    max_size=4,
)


def plainly(
    feature: SparseFeature,
    values: list[Any],
    kind: pa.DataType,
) -> dict[str, int]:
    """The counts of a table from all its values, by a loop."""
    ids = defaultdict(set)
    count = defaultdict(int)
    for value, row in zip(
        values, encode_values(pa.array(values, kind), feature, "").tolist(), strict=True
    ):
        if value is not None:
            ids[row].add(value)
            count[row] += 1
    shared = [row for row in ids if len(ids[row]) > 1]
    return {
        "rows": feature.rows,
        "used": len(ids),
        "shared": len(shared),
        "values": sum(count.values()),
        "values_in_shared_rows": sum(count[row] for row in shared),
    }


@given(BATCHES)
def test_counts_are_those_of_a_plain_loop(
    batches: list[list[tuple[str | None, int | None, list[str]]]],
) -> None:
    """Wrong: an id that comes twice counts as two, a collision within a batch or across batches is
    missed, a follower or values seen before the collision are left out, or missing values and index
    tables are counted."""
    collisions = Collisions(SCHEMA)
    for batch in batches:
        words, numbers, lists = (
            (list(column) for column in zip(*batch, strict=True)) if batch else ([], [], [])
        )
        encode_values(pa.array(words, pa.string()), WORD, "", collisions.add)
        encode_values(pa.array(numbers, pa.int64()), NUMBER, "", collisions.add)
        encode_values(pa.array([7 for _ in words], pa.int64()), CITY, "", collisions.add)
        encode_bag(pa.array(lists, pa.list_(pa.string())), WORDS, "", collisions.add)
    events = [event for batch in batches for event in batch]
    all_words = [word for word, _, _ in events] + [word for _, _, words in events for word in words]
    expected = {
        "word": plainly(WORD, all_words, pa.string()),
        "number": plainly(NUMBER, [n for _, n, _ in events], pa.int64()),
    }
    assert collisions.statistics() == expected


def test_large_tables_are_estimated() -> None:
    """Wrong: the counts of a table that is counted in part are not scaled, or a few popular ids
    decide the figure."""
    rows = 40_001
    watched = 4_000
    ids = 15_000
    draws = 10
    feature = SparseFeature(name="id", rows=rows)
    popularity = (np.arange(ids) + 10.0) ** -1.1
    errors: dict[str, float] = defaultdict(float)
    variances: dict[str, float] = defaultdict(float)
    for seed in range(draws):
        drawn = (
            np.random.default_rng(seed).choice(ids, 60_000, p=popularity / popularity.sum())
            + seed * ids
        )
        whole, part = (
            Collisions(Schema(features=(feature,), tasks=("click",)), limit)
            for limit in (rows, watched)
        )
        for values in np.array_split(drawn, 7):
            for collisions in (whole, part):
                encode_values(pa.array(values.astype(str)), feature, "", collisions.add)
        exact = whole.statistics()["id"]
        estimate = part.statistics()["id"]
        assert (estimate["rows"], estimate["values"]) == (exact["rows"], exact["values"])
        for key in ("used", "shared", "values_in_shared_rows"):
            errors[key] += (estimate[key] - exact[key]) / draws
        for key in ("used", "shared"):  # a tenth of the rows, times ten: about Poisson distributed
            variances[key] += 10 * exact[key] / draws**2
        # An id's row is shared with probability p; the exact figure spreads by its ids' numbers of
        # values about the expected one.
        p = exact["used"] / rows
        counts = np.unique(drawn, return_counts=True)[1].astype(float)
        variances["values_in_shared_rows"] += p * (1 - p) * (counts**2).sum() / draws**2
    for key, error in errors.items():
        assert abs(error) < 4 * math.sqrt(variances[key]) < 0.2 * exact[key], key


def test_the_manifest_has_them_also_after_a_kill(make: MakeConfig, tmp_path: Path) -> None:
    """Wrong: the stream's manifest does not list its collisions, or a preparation that was killed
    counts only the events after the kill."""
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = [f"{i},user{i * 7919 % 300},{i % 2}\n" for i in range(2_000)]
    (raw / "log.csv").write_text("at,user,click\n" + "".join(lines))
    features = [{"name": "user", "rows": 1_000}]
    spec = {
        "format": "csv",
        "files": "log.csv",
        "event_time": {"column": "at"},
        "schema": {"features": features, "tasks": ["click"]},
    }
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(spec))
    data: dict[str, Any] = {
        "schema_file": tmp_path / "schema.yaml",
        "window": {"by": "rows", "rows": 400},
        "table_rows": {"user": 200},
    }

    def kill(window: int, rows: int) -> None:
        """Stop in the middle."""
        if window == 2:
            raise KeyboardInterrupt

    killed = make("table", raw, name="killed", **data)
    with pytest.raises(KeyboardInterrupt):
        prepare(killed, kill)
    tables = [
        read_json(prepare(config).root / "manifest.json")["tables"]
        for config in (make("table", raw, name="whole", **data), killed)
    ]
    user = SparseFeature(name="user", rows=200)
    assert (
        tables[0]
        == tables[1]
        == {"user": plainly(user, [f"user{i * 7919 % 300}" for i in range(2_000)], pa.string())}
    )
    assert 0 < tables[0]["user"]["values_in_shared_rows"] < 2_000
