"""Shared rows are the snapshot's own, of a window's and domain's ids; what does not match is
refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from example import SCHEMA
from publish_snapshots import publish

from exfm_ray.data.stream import EventStream, list_values
from exfm_ray.errors import UserError
from exfm_ray.models.serialization import load_model
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import read_json, write_json
from exfm_ray.stores.shared_rows import SharedStore
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore


@pytest.fixture
def snapshots(tmp_path: Path) -> SnapshotStore:
    for version in (1, 2):
        store = publish(tmp_path / "snapshots", version)
    return store


def publish_rows(
    stream: EventStream,
    snapshots: SnapshotStore,
    window: int = 2,
    version: int = 2,
    tables: tuple[str, ...] = (),
    lag: int = 1,
) -> SharedStore:
    store = SharedStore(snapshots.root.parent / "shared", "fm")
    store.publish(
        stream,
        stream.window(window),
        snapshots,
        version,
        ["feed", "stories"],
        tables,
        SnapshotPolicy(lag),
    )
    return store


def ids_by_hand(
    stream: EventStream,
    window: int,
    domain: str,
) -> dict[str, set[int]]:
    """Collect every id, example by example."""
    ids: dict[str, set[int]] = {name: set() for name in SCHEMA.tables}
    for fragment in stream.window(window).fragments:
        table = stream.read(window, fragment)
        sparse = list_values(table["sparse"], len(SCHEMA.single))
        for row in range(table.num_rows):
            if SCHEMA.domains[table["domain"][row].as_py()] == domain:
                for feature, value in zip(SCHEMA.single, sparse[row].tolist(), strict=True):
                    ids[feature.name].add(value)
                for bag in SCHEMA.bags:
                    ids[bag.table or bag.name] |= set(table[bag.name][row].as_py())
    return ids


@pytest.mark.parametrize("tables", [(), ("ad", "keywords")])
def test_rows_are_the_snapshots_of_the_windows_ids(
    stream: EventStream,
    snapshots: SnapshotStore,
    tables: tuple[str, ...],
) -> None:
    """Wrong: an id is left out or is another domain's, or its row is of another id, table or
    snapshot."""
    store = publish_rows(stream, snapshots, tables=tables)
    model, _ = load_model(snapshots.folder(2))
    for domain in ("feed", "stories"):
        rows = store.read(2, domain, SCHEMA, SnapshotPolicy(1))
        expected = ids_by_hand(stream, 2, domain)
        assert set(rows) == set(tables or SCHEMA.tables)
        for name, (id_X, row_XW, momentum_X) in rows.items():
            assert id_X.tolist() == sorted(expected[name]) and momentum_X is None
            np.testing.assert_array_equal(row_XW.numpy(), model.tables.tables()[name].numpy()[id_X])
    part = store.manifest(2).domains["stories"]
    assert (
        part.rows == sum(len(expected[name]) for name in rows)
        and part.bytes == (store.folder(2) / part.file).stat().st_size
    )


def test_written_again_the_bytes_are_the_same(
    stream: EventStream, snapshots: SnapshotStore
) -> None:
    """Wrong: a window that is published again after a kill differs (rule 5)."""
    folder = publish_rows(stream, snapshots).folder(2)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "manifest.json").unlink()
    publish_rows(stream, snapshots)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and len(
        before
    ) == 3


@pytest.mark.parametrize(("window", "version", "lag"), [(1, 2, 1), (2, 2, 2), (0, 1, 1)])
def test_a_snapshot_that_may_know_the_window_is_refused(
    stream: EventStream,
    snapshots: SnapshotStore,
    window: int,
    version: int,
    lag: int,
) -> None:
    """Wrong: rows carry what the teacher has learned from a window's labels (rule 2)."""
    with pytest.raises(
        UserError,
        match=f"window {window} must not be given rows of snapshot {version}: "
        f"with das.fm_lag = {lag}",
    ):
        publish_rows(stream, snapshots, window, version, lag=lag)
    assert not (snapshots.root.parent / "shared").exists()


def test_rows_that_do_not_match_are_refused(stream: EventStream, snapshots: SnapshotStore) -> None:
    """Wrong: rows of another snapshot, of another numbering, of an unknown domain, damaged or
    missing rows are written into tables."""
    store = publish_rows(stream, snapshots)
    other = Schema.model_validate(SCHEMA.model_dump() | {"tasks": ("click", "like")})
    for arguments, message in (
        (
            (1, "feed", SCHEMA, SnapshotPolicy(1)),
            "window 1 has no committed shared rows of teacher 'fm'; run the DAS",
        ),
        (
            (2, "search", SCHEMA, SnapshotPolicy(1)),
            "no rows for domain 'search', only for feed, stories",
        ),
        ((2, "feed", other, SnapshotPolicy(1)), "numbered by another schema"),
        ((2, "feed", SCHEMA, SnapshotPolicy(2)), "rows of snapshot 2, das.fm_lag = 2 asks for 1"),
    ):
        with pytest.raises(UserError, match=message):
            store.read(*arguments)
    path = store.folder(2) / "manifest.json"
    manifest = read_json(path)
    write_json(path, manifest | {"teacher": "other"})
    with pytest.raises(UserError, match="is of window 2 and teacher 'other'"):
        store.read(2, "feed", SCHEMA, SnapshotPolicy(1))
    write_json(path, manifest)
    file = store.folder(2) / "feed.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(
        UserError, match="feed.safetensors: missing or not the file that its manifest describes"
    ):
        store.read(2, "feed", SCHEMA, SnapshotPolicy(1))
