"""The DAS over stores on S3 writes the same bytes as on a local disk, whatever dies or fails."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import ray
from example import SCHEMA
from local_service import Local, finish, local_services, until
from publish_snapshots import publish
from ray.exceptions import RayActorError
from s3_server import S3
from specs import make_place, make_spec, scored, undisturbed, written

from exfm_ray.das.client import connect, label
from exfm_ray.das.sharded_teacher import row_range
from exfm_ray.data.stream import EventStream
from exfm_ray.models.serialization import copy_model, load_model, load_rows, read_stored_model
from exfm_ray.storage.atomic import read_json, read_jsonl
from exfm_ray.storage.remote import RemotePath, StorageError


@pytest.fixture
def place(s3: S3, tmp_path: Path) -> RemotePath:
    """A folder of the test's own on the server."""
    return RemotePath(s3.url(tmp_path.name))


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Local]:
    """Start services in this process, which scan often."""
    monkeypatch.setattr("exfm_ray.storage.remote.POLL_S", 0.05)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with local_services(monkeypatch) as start:
        yield start


def on_disk(folder: Path, **options: int) -> dict[str, bytes]:
    """Return the supervision of the same stream by the same snapshots on a local disk."""
    return undisturbed(make_spec(make_place(folder, **options)))


def test_kills_on_s3_lose_nothing(
    cluster: None,
    place: RemotePath,
    tmp_path: Path,
) -> None:
    """Wrong: on S3 the death of an actor or of the service loses a fragment, shows half of one, or
    changes a byte (rule 5)."""
    sizes = {"windows": 3, "rows": 1000, "fragment_rows": 50}
    spec = make_spec(
        make_place(place, **sizes),
        log=tmp_path / "timeline.jsonl",
        min_actors=2,
        max_actors=2,
        tries=20,
    )
    kills: list[str] = []

    def watch() -> None:
        if len(kills) >= 2 or len(scored(spec)) < 8 * len(kills) + 3:
            return
        with suppress(RayActorError):
            service = connect(spec)
            ups = [
                actor["process"]
                for actor in ray.get(service.state.remote())["actors"]
                if actor["up"]
            ]
            if ups and not kills:
                os.kill(ups[0], signal.SIGKILL)
            elif ups:
                ray.kill(service, no_restart=True)
            kills.extend(["one"] if ups else [])

    label(spec, EventStream.open(spec.stream_root).windows(), lambda window, rows: None, watch)
    assert len(kills) == 2
    assert written(spec) == on_disk(tmp_path / "disk", **sizes)
    assert sorted(line["window"] for line in read_jsonl(spec.log)) == [1, 2]


def test_a_damaged_snapshot_is_never_used(
    local: Local,
    place: RemotePath,
    tmp_path: Path,
) -> None:
    """Wrong: a snapshot that is damaged on S3 scores, or ends the run."""
    spec = make_spec(make_place(place, windows=3), log=tmp_path / "timeline.jsonl", tries=2)
    damaged = spec.snapshots.folder(2) / "dense.safetensors"
    (tmp_path / "cut").write_bytes(damaged.read_bytes()[:-3])
    damaged.upload(tmp_path / "cut")
    service = local(spec)
    finish(service, spec, range(3))
    ((_, fault),) = service.state()["faults"]
    assert (
        fault.startswith("snapshot 2 is left out")
        and "dense.safetensors: missing or not the file" in fault
    )
    assert [(spec.store.manifest(w).snapshot, spec.store.manifest(w).asked) for w in (1, 2)] == [
        (1, None),
        (1, 2),
    ]


def test_an_outage_ends_no_service(
    local: Local,
    s3: S3,
    place: RemotePath,
    tmp_path: Path,
) -> None:
    """Wrong: a service that follows a stream ends because of a temporary outage of the storage, or
    takes an intact snapshot for a damaged one."""
    spec = make_spec(make_place(place, windows=3, versions=1), log=tmp_path / "timeline.jsonl")
    service = local(spec, detached=True, follow=True)
    until(lambda: spec.store.has(1))
    with s3.refusing():
        until(
            lambda: (
                "rerun the same command to resume when the storage can be used again"
                in service._scheduler._throttled
            )
        )
    publish(place / "snapshots", 2)
    until(lambda: spec.store.has(2))
    assert spec.store.manifest(2).snapshot == 2
    assert not service.state()["error"] and not (spec.store.root / "fm" / "parked.json").exists()
    assert written(spec) == on_disk(tmp_path / "disk", windows=3)


def test_an_outage_damages_no_snapshot(
    place: RemotePath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a snapshot whose files cannot be downloaded now is left out like a damaged one, and an
    older one replaces it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    snapshots = publish(place / "snapshots", 1)

    def fails(self: RemotePath, target: Path) -> None:
        raise StorageError("no answer")

    monkeypatch.setattr(RemotePath, "download", fails)
    for load in (snapshots.load, snapshots.load_dense):
        with pytest.raises(StorageError, match="no answer"):
            load(1, SCHEMA.digest)


def test_parts_and_copies_of_a_model(
    place: RemotePath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a table shard, or the first snapshot's copy for histories, has other rows than on a
    local disk; or the trainer downloads the tables that it has written, to hash them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(
        RemotePath, "download", lambda self, target: pytest.fail(f"{self} was fetched")
    )
    here, there = (publish(root / "snapshots", 1).folder(1) for root in (tmp_path, place))
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert read_json(here / "model.json") == read_json(there / "model.json")
    copy_model(there, place / "copy")
    ranges = {name: row_range(rows, 1, 3) for name, rows in SCHEMA.tables.items()}
    expected = load_rows(here, read_stored_model(here), ranges)
    for folder in (there, place / "copy"):
        actual = load_rows(folder, read_stored_model(folder), ranges)
        assert all((actual[name] == rows).all() for name, rows in expected.items())
        model = load_model(folder)[0].state_dict()
        assert all(
            (model[name] == tensor).all()
            for name, tensor in load_model(here)[0].state_dict().items()
        )
