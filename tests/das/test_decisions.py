"""What the service decides, without Ray: order of windows, failures, limits by readers and
snapshots."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from example import SCHEMA, make_rows
from local_service import Local, finish, local_services, until
from publish_snapshots import publish
from specs import make_place, make_spec, undisturbed, written

from exfm_ray.das.client import out_of_reach
from exfm_ray.das.spec import LabelingSpec, failed_items, fallback_windows
from exfm_ray.data.stream import EventStream, StreamWriter
from exfm_ray.errors import UserError
from exfm_ray.models.serialization import MANIFEST
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import read_json, write_json

pytestmark = pytest.mark.heavy


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[Local]:
    """Start services in this process, which end with the test."""
    with local_services(monkeypatch) as start:
        yield start


def windows_of(spec: LabelingSpec) -> list[int]:
    return EventStream.open(spec.stream_root).windows()


def test_follows_a_stream_that_grows(local: Local, tmp_path: Path) -> None:
    """Wrong: the service misses windows or snapshots that appear while it runs."""
    make_place(tmp_path, windows=2)
    spec = make_spec(tmp_path)
    service = local(spec, detached=True, follow=True)
    until(lambda: spec.store.has(1))
    writer = StreamWriter(spec.stream_root, SCHEMA, {"made": "by the tests"}, 400)
    writer.write_window(2, 2000, 3000, 0, [make_rows(1000, seed=2, first_id=2000)])
    until(lambda: "snapshot 2" in service.state()["throttled"])
    assert not spec.store.has(2)
    publish(tmp_path / "snapshots", 2)
    until(lambda: spec.store.has(2))
    state = service.state()
    assert [(w["window"], w["snapshot"], w["label_s"]) for w in state["written"]] == [
        (1, 1, 2.0),
        (2, 2, 3.0),
    ]
    assert state["backlog"] == {"windows": 0, "fragments": 0, "examples": 0}


def damage(path: Path) -> bytes:
    """Cut a file short and return what it was."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    return whole


def test_a_fragment_that_cannot_be_read_fails(local: Local, tmp_path: Path) -> None:
    """Wrong: one damaged fragment stops the other windows, does not stop the commit of its own
    window, is tried forever, or is never tried again."""
    spec = make_spec(make_place(tmp_path, windows=4), tries=2)
    stream = EventStream.open(spec.stream_root)
    path = stream.path(2, stream.window(2).fragments[1])
    whole = damage(path)
    with pytest.raises(
        UserError,
        match=rf"{path}: \d+ bytes where the manifest says .* "
        r"no supervision of window\(s\) 2 by 'fm'",
    ):
        finish(local(spec), spec, windows_of(spec))
    assert [spec.store.has(w) for w in range(4)] == [False, True, False, True]
    (listed,) = read_json(spec.store.root / "fm" / "parked.json")
    assert (listed["window"], listed["fragment"], listed["snapshot"], listed["tries"]) == (
        2,
        path.name,
        2,
        2,
    )
    (message,) = failed_items(spec)
    assert message["teacher"] == "fm" and message["cause"].startswith(f"{path}: "), (
        "for summary and report"
    )
    path.write_bytes(whole)
    assert finish(local(spec), spec, windows_of(spec)) == {2: 400}, (
        "the other fragments of the window were scored before"
    )
    assert read_json(spec.store.root / "fm" / "parked.json") == [] == failed_items(spec)
    assert written(spec) == undisturbed(spec)


def test_a_damaged_snapshot_is_never_used(local: Local, tmp_path: Path) -> None:
    """Wrong: a damaged snapshot scores, ends the run, or goes unreported. The one before it must
    replace it and be named in every row."""
    spec = make_spec(make_place(tmp_path, windows=4), tries=2)
    damage(spec.snapshots.folder(2) / "dense.safetensors")
    service = local(spec)
    finish(service, spec, range(4))
    ((_, fault),) = service.state()["faults"]
    assert (
        fault.startswith("snapshot 2 is left out")
        and "dense.safetensors: missing or not the file" in fault
    )
    assert [(spec.store.manifest(w).snapshot, spec.store.manifest(w).asked) for w in (1, 2, 3)] == [
        (1, None),
        (1, 2),
        (3, None),
    ]
    assert fallback_windows(spec) == [{"teacher": "fm", "window": 2, "asked": 2, "snapshot": 1}]


@pytest.mark.parametrize("fault", ["half published", "another schema", "pinned"])
def test_snapshots_that_cannot_serve(
    local: Local,
    tmp_path: Path,
    fault: str,
) -> None:
    """Wrong: the only snapshot that may score a window is damaged, but the window is committed, or
    the cause is not named."""
    pinned = 2 if fault == "pinned" else None
    spec = make_spec(make_place(tmp_path), tries=2, pinned=pinned)
    message = "missing or not the file"
    if fault == "half published":  # by a trainer that was killed in between and resumed
        (spec.snapshots.folder(1) / MANIFEST).unlink()
        message = "snapshot 1 of teacher 'fm' is not there, though later ones are"
    elif fault == "another schema":
        publish(
            tmp_path / "snapshots",
            1,
            Schema.model_validate(SCHEMA.model_dump() | {"tasks": ("click", "like")}),
        )
        message = "another schema than the stream's"
    else:
        damage(spec.snapshots.folder(2) / "dense.safetensors")
    bad = 2 if pinned else 1
    with pytest.raises(UserError, match=rf"{message}.* no supervision of window\(s\) {bad} by"):
        finish(local(spec), spec, windows_of(spec))
    assert [spec.store.has(w) for w in (1, 2)] == ([False, False] if pinned else [False, True])


def test_nan_is_not_committed(local: Local, tmp_path: Path) -> None:
    """Wrong: a teacher that has diverged stops the windows of other snapshots, or its NaN is
    committed."""
    spec = make_spec(make_place(tmp_path), tries=1)
    publish(tmp_path / "snapshots", 1, scale=float("nan"))
    with pytest.raises(
        UserError,
        match=r"snapshot 1 of teacher 'fm' predicts NaN for task 'click'.* "
        r"no supervision of window\(s\) 1 by",
    ):
        finish(local(spec), spec, windows_of(spec))
    assert spec.store.has(2) and not spec.store.has(1)


def test_a_full_disk(local: Local, tmp_path: Path) -> None:
    """Wrong: a window that cannot be written is committed, or is not written again when there is
    space."""
    spec = make_spec(make_place(tmp_path), tries=2)
    full = spec.store.root / "fm" / "window=001"
    full.parent.mkdir(parents=True)
    full.touch()  # no folder can be made here, as root may write to a read-only one
    with pytest.raises(UserError, match=r"Error: .*no supervision of window\(s\) 1 by"):
        finish(local(spec), spec, windows_of(spec))
    assert spec.store.has(2)
    full.unlink()
    finish(local(spec), spec, windows_of(spec))
    assert written(spec) == undisturbed(spec)


def test_is_throttled_when_readers_fall_behind(local: Local, tmp_path: Path) -> None:
    """Wrong: supervision runs further ahead of the slowest reader than das.max_windows_ahead, or
    stops for good."""
    readers = (tmp_path / "fast", tmp_path / "slow")
    spec = replace(make_spec(make_place(tmp_path, windows=6), ahead=2), readers=readers)
    service = local(spec, detached=True)

    def learned(
        reader: Path,
        windows: int,
        inside: str = ".examples=00000100",
    ) -> None:
        write_json(reader / f"windows={windows:03d}{inside}" / "manifest.json", {})

    until(
        lambda: (
            "window 2 is das.max_windows_ahead = 2 windows ahead" in service.state()["throttled"]
        )
    )
    until(lambda: spec.store.has(1))
    learned(readers[0], 6, inside="")
    learned(readers[1], 2)
    until(lambda: "window 4" in service.state()["throttled"])
    until(lambda: spec.store.has(3))
    assert not spec.store.has(4) and not spec.store.has(5)
    learned(readers[1], 6)
    until(lambda: spec.store.has(5))


def test_snapshots_are_removed_when_no_window_needs_them(local: Local, tmp_path: Path) -> None:
    """Wrong: a snapshot is removed that an open, a failed or a future window needs, or none is ever
    removed."""
    spec = replace(
        make_spec(make_place(tmp_path, windows=6), fm_lag=2, tries=1), owns_snapshots=True
    )
    stream = EventStream.open(spec.stream_root)
    path = stream.path(4, stream.window(4).fragments[0])
    whole = damage(path)
    with pytest.raises(UserError, match=r"no supervision of window\(s\) 4"):
        finish(local(spec), spec, windows_of(spec))
    assert spec.snapshots.versions() == [2, 3, 4, 5], (
        "3 scores the failed window 4, 2 is its fallback"
    )
    path.write_bytes(whole)
    finish(local(spec), spec, windows_of(spec))
    assert spec.snapshots.versions() == [4, 5], "5 scores the window to come, 4 is its fallback"


def test_supervision_that_was_removed_is_written_again(local: Local, tmp_path: Path) -> None:
    """Wrong: a service that has committed a window once believes forever that its supervision is
    there."""
    spec = make_spec(make_place(tmp_path))
    service = local(spec)
    finish(service, spec, [1, 2])
    shutil.rmtree(spec.store.root / "fm" / "window=001")
    assert finish(service, spec, [1, 2]) == {1: 1000}
    assert written(spec) == undisturbed(spec)


def test_a_failed_window_blocks_those_that_wait_for_its_readers(
    local: Local, tmp_path: Path
) -> None:
    """Wrong: a client waits for windows that will never be scored, because readers cannot learn a
    failed window; or it gives up other windows."""
    spec = replace(
        make_spec(make_place(tmp_path, windows=6), ahead=2, tries=1),
        readers=(tmp_path / "reader",),
    )
    full = spec.store.root / "fm" / "window=002"
    full.parent.mkdir(parents=True)
    full.touch()  # no folder can be made here
    write_json(tmp_path / "reader" / "windows=002" / "manifest.json", {})  # it can learn no more
    service = local(spec, detached=True)
    until(
        lambda: (
            "window 4 is das.max_windows_ahead = 2 windows ahead" in service.state()["throttled"]
        )
    )
    until(lambda: spec.store.has(3))
    assert {row["window"] for row in failed_items(spec)} == {2}
    missing = {window for window in windows_of(spec)[1:] if not spec.store.has(window)}
    assert missing == {2, 4, 5} and out_of_reach(spec, missing, {2}) == {4, 5}
    assert not out_of_reach(replace(spec, readers=()), missing, {2}) and not out_of_reach(
        spec, missing, set()
    )
