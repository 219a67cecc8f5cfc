"""Sizes of tables by setting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.sources.base import indexed, sequence, with_table_rows
from exfm_ray.errors import UserError
from exfm_ray.schema import Schema, SparseFeature

MakeConfig = Callable[..., Config]
AD = SparseFeature(name="ad", rows=50)
SCHEMA = Schema(
    features=(
        AD,
        SparseFeature(name="user", rows=100),
        indexed("hour", 24),
        sequence("ads", AD, 5),
    ),
    tasks=("click",),
    group_by="user",
)


def test_named_tables_and_their_followers_get_their_size() -> None:
    """Wrong: a setting has no effect, a follower keeps the old size, or other tables and facts of
    the schema change."""
    found = with_table_rows(SCHEMA, {"ad": 70})
    assert {f.name: f.rows for f in found.features} == {
        "ad": 70,
        "user": 100,
        "hour": 25,
        "ads": 70,
    }
    assert found.tables == {"ad": 70, "user": 100, "hour": 25, "domain": 2}
    assert (
        found.digest != SCHEMA.digest
        and found.group_by == "user"
        and found.features[3].max_length == 5
    )
    assert (
        with_table_rows(SCHEMA, {}) == SCHEMA
        and with_table_rows(found, {"ad": 50}).digest == SCHEMA.digest
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("usr", r"'data\.table_rows': no embedding table is named 'usr'\. Did you mean 'user'\?"),
        ("zzz", r"no embedding table is named 'zzz'\. There are ad, user, hour, domain"),
        ("ads", r"no embedding table is named 'ads'\. It shares that of 'ad'"),
        ("hour", r"'data\.table_rows\.hour': the rows of this table are the ids themselves"),
        ("domain", r"'data\.table_rows\.domain': the rows of this table are the ids themselves"),
    ],
)
def test_tables_that_cannot_be_sized(table: str, message: str) -> None:
    """Wrong: a misspelled table is ignored, or ids of an index table fall outside it."""
    with pytest.raises(UserError, match=message):
        with_table_rows(SCHEMA, {table: 70})


def test_the_size_is_part_of_the_stream(make: MakeConfig, data_set: Callable[[str], Path]) -> None:
    """Wrong: ids are hashed into the old size, or a stream of another size is taken for this
    one."""
    root = data_set("criteo_sample")
    rows = {"by": "rows", "rows": 4_000}
    settings: dict[str, Any] = {"window": rows, "hash_rows": 5_000}
    stream = prepare(make("criteo", root, table_rows={"C3": 300}, **settings))
    assert (stream.schema.tables["C3"], stream.schema.tables["C4"]) == (300, 5_000)
    for fragment in stream.window(0).fragments:
        stream.read(0, fragment)  # checks each id against its table
    with pytest.raises(UserError, match="another schema or other settings"):
        prepare(make("criteo", root, table_rows={"C3": 301}, **settings))
