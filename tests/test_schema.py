"""The schema: what it refuses, and the order and types that other modules rely on."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from example import SCHEMA
from pydantic import ValidationError

from exfm_ray.schema import DOMAIN_FEATURE, Encoding, Kind, Schema, SparseFeature

USER = {"name": "user", "rows": 10}

REFUSED: dict[str, dict[str, Any]] = {
    "feature 'user' is declared twice": {"features": [USER, USER]},
    "feature 'user' is declared twice ": {"features": [USER], "dense": [{"name": "user"}]},
    "feature 'labels' has the name of a packed column": {
        "features": [{"name": "labels", "rows": 3}]
    },
    "feature 'ad' shares the table of 'usr', which has no table of its own. Did you mean 'user'": {
        "features": [USER, {"name": "ad", "rows": 10, "table": "usr"}]
    },
    "feature 'ad' and 'user' share a table: set the same rows": {
        "features": [USER, {"name": "ad", "rows": 9, "table": "user"}]
    },
    "group_by names 'usr', which is not a single-valued feature. Did you mean 'user'": {
        "features": [USER],
        "group_by": "usr",
    },
    "at least 1 item": {"features": [USER], "tasks": []},
    "greater than or equal to 2": {"features": [{"name": "user", "rows": 1}]},
    "should match pattern": {"features": [{"name": "a/b", "rows": 3}]},
    "Extra inputs": {"features": [USER | {"size": 3}]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_inconsistent_schemas(message: str) -> None:
    """Wrong: a schema that cannot be trained on is noticed only in the middle of a run."""
    with pytest.raises(ValidationError) as caught:
        Schema.model_validate({"tasks": ["click"]} | REFUSED[message])
    assert message.strip() in str(caught.value)


@pytest.mark.parametrize("name", ["domain", "example_id"])
def test_refuses_reserved_names(name: str) -> None:
    """Wrong: a feature with the name of the domain feature hides it."""
    with pytest.raises(ValidationError, match="rename it"):
        Schema(features=(SparseFeature(name=name, rows=3),), tasks=("click",))


def test_order_and_tables() -> None:
    """Wrong: the packed columns, the tables and the models count features in different orders."""
    assert [f.name for f in SCHEMA.single] == ["user", "ad", "hour", DOMAIN_FEATURE]
    assert SCHEMA.single[-1].encoding is Encoding.INDEX and SCHEMA.single[-1].rows == 4
    assert [(f.name, f.kind) for f in SCHEMA.bags] == [
        ("keywords", Kind.MULTI),
        ("clicked_ads", Kind.SEQUENCE),
    ]
    assert SCHEMA.tables == {"user": 101, "ad": 51, "hour": 25, "domain": 4, "keywords": 20}
    assert SCHEMA.arrow_schema.field("sparse").type == pa.list_(pa.int32(), 4)
    assert SCHEMA.arrow_schema.names == [
        "example_id",
        "event_time",
        "domain",
        "labels",
        "sparse",
        "dense",
        "keywords",
        "clicked_ads",
    ]
    assert (
        "dense" not in Schema.model_validate(SCHEMA.model_dump() | {"dense": ()}).arrow_schema.names
    )


def test_digest_names_the_content() -> None:
    """Wrong: two schemas have one digest, or a schema has another digest after JSON."""
    restored = Schema.model_validate_json(SCHEMA.model_dump_json())
    assert restored == SCHEMA and restored.digest == SCHEMA.digest
    other = Schema.model_validate(SCHEMA.model_dump() | {"tasks": ("click", "like")})
    assert other.digest != SCHEMA.digest


def test_unknown_names_come_with_a_suggestion() -> None:
    """Wrong: a misspelled domain or task is a KeyError."""
    assert SCHEMA.domain_index("search") == 1 and SCHEMA.task_index("conversion") == 1
    with pytest.raises(
        ValueError,
        match=r"unknown domain 'serach': the stream has feed, search, stories. "
        r"Did you mean 'search'",
    ):
        SCHEMA.domain_index("serach")
    with pytest.raises(ValueError, match=r"unknown task 'clik'.*Did you mean 'click'"):
        SCHEMA.task_index("clik")
