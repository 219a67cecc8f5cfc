"""New ids, counted against sets of ids row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
from example import SCHEMA, make_rows

from exfm_ray.data.new_ids import new_ids, tracked_features, write_new_ids
from exfm_ray.data.stream import EventStream, StreamWriter, list_values
from exfm_ray.schema import Schema, SparseFeature
from exfm_ray.storage.atomic import read_json


def sparse_stream(root: Path, counts: list[int]) -> EventStream:
    """Windows of so few rows that many ids are new, in fragments of 7."""
    writer = StreamWriter(root, SCHEMA, {}, fragment_rows=7)
    for window, rows in enumerate(counts):
        writer.write_window(
            window,
            window,
            window + 1,
            0,
            [make_rows(rows, seed=window, first_id=1000 * window)] if rows else [],
        )
    writer.finish({})
    return EventStream.open(root)


def by_hand(stream: EventStream, feature: str) -> dict[tuple[int, str], float]:
    place = [f.name for f in SCHEMA.single].index(feature)
    before: set[int] = {0}
    found = {}
    for window in stream.windows():
        rows: list[tuple[str, int]] = []
        for fragment in stream.window(window).fragments:
            table = stream.read(window, fragment)
            ids = list_values(table["sparse"], len(SCHEMA.single))[:, place]
            rows += [
                (SCHEMA.domains[d], int(i))
                for d, i in zip(table["domain"].to_pylist(), ids, strict=True)
            ]
        for domain in (*SCHEMA.domains, "all"):
            mine = [i for d, i in rows if domain in (d, "all")]
            if window and mine:
                found[window, domain] = sum(i not in before for i in mine) / len(mine)
        before |= {i for _, i in rows}
    return found


def test_fractions_count_ids_not_seen_before(tmp_path: Path) -> None:
    """Wrong: an id of the same window or fragment counts as old, a missing one as new, or domains
    are mixed up."""
    stream = sparse_stream(tmp_path / "stream", [30, 20, 0, 40, 3])
    rows = new_ids(stream)
    for feature in ("user", "ad"):
        found = {
            (row["window"], row["domain"]): row["share"]
            for row in rows
            if row["feature"] == feature
        }
        assert (
            found == pytest.approx(by_hand(stream, feature))
            and 0 < found[1, "all"] < 1
            and (2, "all") not in found
        )
    assert {row["feature"] for row in rows} == {"user", "ad"}
    write_new_ids(stream, tmp_path / "new_ids.json")
    assert read_json(tmp_path / "new_ids.json") == rows


def test_the_user_and_the_largest_table_are_tracked() -> None:
    """Wrong: the report covers the hour of the day instead of users and ads."""
    features = tuple(
        SparseFeature(name=name, rows=rows)
        for name, rows in (("hour", 25), ("ad", 900), ("user", 300), ("maker", 500))
    )
    assert tracked_features(Schema(features=features, tasks=("t",), group_by="user")) == [
        "user",
        "ad",
    ]
    assert tracked_features(Schema(features=features, tasks=("t",))) == ["ad", "maker"]
    assert tracked_features(Schema(features=features[:1], tasks=("t",))) == ["hour"]
