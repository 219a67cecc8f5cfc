"""Representations and the feature store equal a slow computation, example by example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from alignment import aligned_slowly
from example import SCHEMA
from publish_snapshots import publish
from uneven_streams import STREAMS, WINDOWS, uneven_stream

from exfm_ray.config.distillation import HistoryConfig
from exfm_ray.data.batch import to_batch
from exfm_ray.data.stream import EventStream, list_values
from exfm_ray.errors import UserError
from exfm_ray.models.serialization import load_model
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import read_json, write_json
from exfm_ray.stores.representations import projection, quantize
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.user_history import HistoryStore

pytestmark = pytest.mark.heavy

DIM = 3
SEED = 7


def store_of(
    folder: Path,
    stream: EventStream,
    windows: int = WINDOWS,
    **settings: Any,
) -> HistoryStore:
    """Represent windows 1 and later, each by its own snapshot."""
    for version in range(1, WINDOWS):
        snapshots = publish(folder / "snapshots", version)
    store = HistoryStore(
        folder / "history", "fm", HistoryConfig(dim=DIM, **settings), SnapshotPolicy(1)
    )
    for window in range(1, windows):
        store.publish(stream, stream.window(window), snapshots, window, SEED)
    return store


def expected_summaries(
    folder: Path,
    stream: EventStream,
    drift: str,
    last: int,
) -> dict[int, list[list[float]]]:
    """Return window -> what each of its examples gets, in float64, one example at a time."""
    matrix = projection(8, DIM, SEED).double().numpy()
    seen: dict[int, list[np.ndarray]] = {}
    given: dict[int, list[list[float]]] = {}
    space = 0
    for window in range(WINDOWS):
        examples = [stream.read(window, f) for f in stream.window(window).fragments]
        users = [
            int(u) for t in examples for u in list_values(t["sparse"], len(SCHEMA.single))[:, 0]
        ]
        rows = []
        for user in users:
            past = seen.get(user, []) if user else []
            newest = [v.tolist() for v in past[::-1][:last]] + [[0.0] * DIM] * (
                last - len(past[:last])
            )
            mean = [np.mean(past, axis=0).tolist() if past else [0.0] * DIM]
            rows.append(
                [np.log(1 + len(past)), *(x for part in (newest if last else mean) for x in part)]
            )
        given[window] = rows
        if window and users:

            def values(version: int, tables: Any = tuple(examples)) -> np.ndarray:
                model, _ = load_model(folder / "snapshots" / "fm" / f"version={version:03d}")
                batches = [to_batch(table, SCHEMA) for table in tables]
                x = [
                    model.network.features(model.tables(batch), batch.dense_BD)
                    .detach()
                    .double()
                    .numpy()
                    for batch in batches
                ]
                return np.concatenate(x) @ matrix

            new = values(1 if drift == "pinned" else window)
            scale = np.maximum(np.abs(new).max(axis=1, keepdims=True) / 127, 1e-12)
            new = np.rint(new / scale) * scale
            if drift == "aligned" and space:
                turn = aligned_slowly(values(space), new)
                seen = {user: [v @ turn for v in past] for user, past in seen.items()}
            space = window
            for user, value in zip(users, new, strict=True):
                seen.setdefault(user, []).append(value)
    return given


@pytest.mark.parametrize(
    ("drift", "rows"),
    [("pinned", "even"), ("refreshed", "even"), *(("aligned", rows) for rows in STREAMS)],
)
@pytest.mark.parametrize("last", [0, 4])
def test_what_examples_get(
    tmp_path: Path,
    drift: str,
    rows: str,
    last: int,
) -> None:
    """Wrong: an example gets something from its own or a later window, of another user, in another
    order, of another snapshot, or in a space that the store has left: with few examples or none
    there is little to map it by."""
    stream = uneven_stream(tmp_path / "stream", STREAMS[rows])
    store = store_of(tmp_path, stream, embedding_space=drift, last_k=last)
    expected = expected_summaries(tmp_path, stream, drift, last)
    for window in range(WINDOWS):
        tables = [stream.read(window, f) for f in stream.window(window).fragments]
        if not tables:
            continue
        actual = np.concatenate(
            [
                list_values(store.join(window, t, SCHEMA)["history"], 1 + max(last, 1) * DIM)
                for t in tables
            ]
        )
        # The sums are float32. A value between two levels of int8 may be rounded to the other
        # one: one level of a few hundred values.
        off = np.abs(actual - np.array(expected[window])) > 1e-4 + 1e-3 * np.abs(actual)
        assert off.mean() < 0.02, (window, off.mean())
        assert np.abs(actual - np.array(expected[window])).max() < 0.05
        assert actual.any() == (window > 1)


def test_written_codes_are_the_representations(tmp_path: Path) -> None:
    """Wrong: codes of other rows, or further from the values than half a level."""
    stream = uneven_stream(tmp_path / "stream", STREAMS["even"])
    store = store_of(tmp_path, stream, windows=3, embedding_space="refreshed")
    model, _ = load_model(tmp_path / "snapshots" / "fm" / "version=002")
    for fragment in stream.window(2).fragments:
        table = stream.read(2, fragment)
        written = pq.read_table(store.folder(2) / fragment.file, partitioning=None)
        assert (
            written["example_id"].equals(table["example_id"])
            and written["code"].type.value_type == "int8"
        )
        batch = to_batch(table, SCHEMA)
        with torch.no_grad():
            value = (
                model.network.features(model.tables(batch), batch.dense_BD)
                @ projection(8, DIM, SEED)
            ).numpy()
        scale = written["scale"].to_numpy()[:, None]
        assert (np.abs(list_values(written["code"], DIM) * scale - value) <= 0.5001 * scale).all()


def test_published_again_the_bytes_are_the_same(tmp_path: Path) -> None:
    """Wrong: a window that is represented again after a kill differs (rule 5)."""
    stream = uneven_stream(tmp_path / "stream", STREAMS["even"])
    store = store_of(tmp_path, stream, last=2)
    before = {path: path.read_bytes() for path in sorted(store.folder(2).iterdir())}
    (store.folder(2) / "manifest.json").unlink()
    assert not store.ready(3)
    store_of(tmp_path, stream, last=2)
    assert {path: path.read_bytes() for path in sorted(store.folder(2).iterdir())} == before


def test_refusals(tmp_path: Path) -> None:
    """Wrong: a snapshot that may know the window represents it; a store that is missing, or of
    other settings, is read as an empty one."""
    stream = uneven_stream(tmp_path / "stream", STREAMS["even"])
    store = store_of(tmp_path, stream, windows=2)
    with pytest.raises(
        UserError,
        match="window 1 must not be represented by snapshot 2: with das.fm_lag = 1 it takes one",
    ):
        store.publish(stream, stream.window(1), publish(tmp_path / "snapshots", 2), 2, SEED)
    with pytest.raises(
        UserError, match="window 2 has no committed representations of teacher 'fm'; run the DAS"
    ):
        store.state_before(3, SCHEMA)
    with pytest.raises(UserError, match="other settings of distillation.history"):
        HistoryStore(
            store.root, "fm", HistoryConfig(dim=DIM, last=1), SnapshotPolicy(1)
        ).state_before(2, SCHEMA)


def test_a_store_that_does_not_match_is_refused(tmp_path: Path) -> None:
    """Wrong: a store that is damaged, or of another teacher, window or schema, or of a snapshot
    that knows the window, is read."""
    stream = uneven_stream(tmp_path / "stream", STREAMS["even"])
    store = store_of(tmp_path, stream, windows=3)
    assert store.state_before(2, SCHEMA) is store.state_before(2, SCHEMA), (
        "read once, not for each fragment"
    )
    other = Schema.model_validate(SCHEMA.model_dump() | {"tasks": ("click", "like")})
    with pytest.raises(UserError, match="another schema .*another --name"):
        store.state_before(2, other)
    path = store.folder(1) / "manifest.json"
    manifest = read_json(path)
    for change, message in (
        (
            {"teacher": "other"},
            "of window 1 and teacher 'other'; with das.keep_snapshots=true from the start: "
            "remove .*window=001 and run the DAS",
        ),
        ({"window": 2}, "of window 2 and teacher 'fm'"),
        (
            {"snapshot": 2},
            "by snapshot 2 in the space of 1, but with das.fm_lag = 1 it takes one that has "
            "learned no window after 0",
        ),
        ({"space": 3}, "by snapshot 1 in the space of 3, but"),
        ({"users": "many"}, "manifest.json: not a manifest of representations"),
    ):
        write_json(path, manifest | change)
        with pytest.raises(UserError, match=message):
            store.state_before(2, SCHEMA)
    write_json(path, manifest)
    file = store.folder(1) / "after.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], None):
        file.write_bytes(damaged) if damaged else file.unlink()
        with pytest.raises(
            UserError,
            match="after.safetensors: missing or not the file that its manifest describes; "
            "with das.keep_snapshots=true",
        ):
            store.state_before(2, SCHEMA)
    file.write_bytes(whole)
    assert len(store.state_before(2, SCHEMA).users_U)


def test_zeros_stay_zeros() -> None:
    """Wrong: a representation of zeros becomes NaN."""
    code, scale = quantize(np.zeros((2, 3), np.float32))
    assert not code.any() and np.isfinite(scale).all()
