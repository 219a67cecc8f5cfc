"""The scorer writes the snapshot's own predictions, each fragment once, never by a too new
snapshot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from example import SCHEMA
from publish_snapshots import publish
from specs import make_spec

from exfm_ray.das.scorer import Scorer, ScoreResult, score_rows
from exfm_ray.data.batch import to_batch
from exfm_ray.data.stream import EventStream, Fragment
from exfm_ray.errors import UserError
from exfm_ray.models.serialization import MANIFEST, load_model
from exfm_ray.schema import Schema
from exfm_ray.stores.snapshots import SnapshotStore


@pytest.fixture
def snapshots(tmp_path: Path) -> SnapshotStore:
    for version in (1, 2):
        store = publish(tmp_path / "snapshots", version)
    return store


def make_scorer(
    snapshots: SnapshotStore,
    folder: str = "supervision",
    fm_lag: int = 1,
) -> Scorer:
    return Scorer(make_spec(snapshots.root.parent, folder, fm_lag=fm_lag))


def score_all(
    scorer: Scorer,
    window: int,
    fragments: Sequence[Fragment],
    version: int,
) -> list[int]:
    """Score fragments and return the scored rows of each."""
    return [scorer.score(window, fragment, version).rows for fragment in fragments]


def test_writes_the_snapshots_predictions(stream: EventStream, snapshots: SnapshotStore) -> None:
    """Wrong: predictions of another version, of another batch's rows, or under another task's
    name."""
    scorer = make_scorer(snapshots)
    window = stream.window(2)
    assert score_all(scorer, 2, window.fragments, 2) == [400, 400, 200]
    model, _ = load_model(snapshots.folder(2))
    for fragment in window.fragments:
        written = pq.read_table(
            make_spec(snapshots.root.parent).store.path(2, fragment), partitioning=None
        )
        p_NT = model.score(to_batch(stream.read(2, fragment), SCHEMA)).numpy()
        for i, task in enumerate(SCHEMA.tasks):
            # the same float32 weights on batches of 150 rows instead of 400
            np.testing.assert_allclose(
                written[f"prediction:{task}"].to_numpy(), p_NT[:, i], rtol=1e-5
            )
        assert set(written["snapshot"].to_pylist()) == {2} and set(
            written["teacher"].to_pylist()
        ) == {"fm"}


def test_interrupted_between_fragments_and_manifest(
    stream: EventStream, snapshots: SnapshotStore
) -> None:
    """Wrong: after a kill before the manifest, fragments are scored twice, or with other results
    (rules 3 and 5)."""
    window = stream.window(1)
    whole, killed = (make_scorer(snapshots, folder) for folder in ("whole", "killed"))
    stores = {name: make_spec(snapshots.root.parent, name).store for name in ("whole", "killed")}
    assert score_all(whole, 1, window.fragments, 1) == [400, 400, 200]
    killed.score(1, window.fragments[0], 1)
    (
        stores["killed"].path(1, window.fragments[1]).parent / ".fragment=0001.parquet.1.tmp"
    ).write_bytes(b"torn")
    stores["killed"].path(1, window.fragments[2]).write_bytes(b"PAR1 torn by a disk")
    assert not stores["killed"].has(1)
    again = make_scorer(snapshots, "killed")
    assert score_all(again, 1, window.fragments, 1) == [0, 400, 200]
    assert again.score(1, window.fragments[0], 1) == ScoreResult(0, 0.0)
    for fragment in window.fragments:
        assert (
            stores["killed"].path(1, fragment).read_bytes()
            == stores["whole"].path(1, fragment).read_bytes()
        )


def test_supervision_of_another_snapshot_is_written_again(
    stream: EventStream, snapshots: SnapshotStore
) -> None:
    """Wrong: what an older snapshot wrote before a kill counts as the requested one's."""
    scorer = make_scorer(snapshots)
    fragments = stream.window(2).fragments
    score_all(scorer, 2, fragments, 1)
    assert score_all(scorer, 2, fragments, 2) == [fragment.rows for fragment in fragments]


@pytest.mark.parametrize(
    ("window", "fm_lag", "version"), [(0, 1, 1), (1, 1, 2), (1, 2, 1), (3, 4, 1)]
)
def test_refuses_a_snapshot_that_is_too_new(
    stream: EventStream,
    snapshots: SnapshotStore,
    window: int,
    fm_lag: int,
    version: int,
) -> None:
    """Wrong: the teacher has seen the labels of what it predicts (rule 2)."""
    scorer = make_scorer(snapshots, fm_lag=fm_lag)
    with pytest.raises(
        UserError,
        match=f"window {window} must not be scored by snapshot {version}: "
        f"with das.fm_lag = {fm_lag}",
    ):
        scorer.score(window, stream.window(0).fragments[0], version)
    assert not make_spec(snapshots.root.parent).store.root.exists()


def test_refuses_snapshots_that_do_not_match_their_names(
    stream: EventStream,
    snapshots: SnapshotStore,
    tmp_path: Path,
) -> None:
    """Wrong: a snapshot that is missing, renamed, damaged, or of another schema is scored with."""
    other = Schema.model_validate(SCHEMA.model_dump() | {"tasks": ("click", "like")})
    publish(tmp_path / "snapshots", 3, schema=other)
    publish(tmp_path / "snapshots", 4, named=2)
    digest = stream.schema.digest
    for version, message in (
        (3, "another schema"),
        (4, "not version 4 of teacher 'fm'"),
        (9, "snapshot 9 of teacher 'fm' is not published"),
    ):
        with pytest.raises(UserError, match=message):
            snapshots.load(version, digest)
    dense = snapshots.folder(2) / "dense.safetensors"
    dense.write_bytes(dense.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(UserError, match="dense.safetensors: missing or not the file"):
        snapshots.load(2, digest)
    (snapshots.folder(2) / "dense.safetensors").unlink()
    with pytest.raises(UserError, match="dense.safetensors: missing or not the file"):
        snapshots.load(2, digest)
    manifest = snapshots.folder(1) / MANIFEST
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(fields | {"files": {"../../x": "0"}}))
    with pytest.raises(UserError, match="damaged"):
        snapshots.load(1, digest)
    manifest.unlink()
    assert not snapshots.has(1)


def test_old_snapshots_are_removed(snapshots: SnapshotStore) -> None:
    """Wrong: snapshots fill the disk, or one that is still needed is removed."""
    publish(snapshots.root, 3)
    snapshots.remove_before(3)
    assert snapshots.versions() == [3]


def test_an_actor_starts_while_the_storage_is_unavailable(
    tmp_path: Path, stream: EventStream
) -> None:
    """Wrong: three actors that start while the stream cannot be opened end the whole service."""
    scorer = Scorer(make_spec(tmp_path / "away"))
    with pytest.raises(UserError, match="no prepared stream here"):
        scorer.score(1, stream.window(1).fragments[0], 1)


def test_no_rows(stream: EventStream, snapshots: SnapshotStore) -> None:
    """Wrong: a fragment without rows stops the scorer."""
    model, _ = load_model(snapshots.folder(1))
    table = stream.read(0, stream.window(0).fragments[0]).slice(0, 0)
    assert len(score_rows(model, to_batch(table, SCHEMA), 10)) == 0
