"""Folders of checkpoints as a start finds them: which are taken, which are set aside, what is
told."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import write_json
from exfm_ray.training.checkpoint import Checkpoints, Cursor, Manifest

FILE = "state.rank0000.safetensors"


def write(root: Path, windows: int) -> Path:
    """A whole checkpoint of one worker, with a file of a few bytes."""
    folder = root / f"windows={windows:03d}"
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(b"state")
    manifest = Manifest(
        windows=windows,
        examples=0,
        workers=1,
        files={FILE: hashlib.sha256(b"state").hexdigest()},
        teacher=None,
        timings=[],
        underway=None,
        stopping=None,
    )
    write_json(folder / "manifest.json", manifest.sealed().model_dump(mode="json"))
    return folder


def failing_disk(folder: Path) -> None:
    """Reading the file fails with EIO: nothing is mapped at a process's address 0."""
    (folder / FILE).unlink()
    (folder / FILE).symlink_to("/proc/self/mem")


def unreadable_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()


@pytest.mark.parametrize("spoil", [failing_disk, unreadable_manifest])
def test_a_checkpoint_that_cannot_be_read_is_damaged(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """Wrong: a disk that fails under one file, or a file that may not be read, ends the run though
    there is a sound checkpoint before it."""
    write(tmp_path, 1)
    spoil(write(tmp_path, 2))
    (told,) = Checkpoints(tmp_path).set_aside_damaged()
    assert (
        "windows=002 is damaged (it cannot be read: [Errno " in told
        and "windows=001, is gone on from" in told
    )
    assert (
        Checkpoints(tmp_path).latest() == Cursor(1) and (tmp_path / "damaged.windows=002").is_dir()
    )


def test_a_lost_manifest_is_told(tmp_path: Path) -> None:
    """Wrong: a checkpoint whose manifest is gone vanishes without a word, or one that is older than
    what is gone on from alarms for nothing."""
    write(tmp_path, 2)
    for name in ("windows=001", "windows=002.examples=00000064", "windows=1000", "windows=old"):
        (tmp_path / name).mkdir()
    told = list(Checkpoints(tmp_path).set_aside_damaged())
    assert [
        line.partition(" has no manifest.json and is not used: ")[0].rpartition("/")[2]
        for line in told
    ] == [
        "windows=002.examples=00000064",
        "windows=1000",
    ]
    assert all("windows=002 is gone on from" in line for line in told) and Checkpoints(
        tmp_path
    ).latest() == Cursor(2)


def test_without_any_manifest_the_job_begins_anew(tmp_path: Path) -> None:
    """Wrong: the first checkpoint's folder, as a kill leaves it, is taken for a checkpoint."""
    (tmp_path / "windows=001").mkdir()
    (told,) = Checkpoints(tmp_path).set_aside_damaged()
    assert "this job begins anew" in told and Checkpoints(tmp_path).latest() == Cursor(0)
    assert not list(Checkpoints(tmp_path / "none").set_aside_damaged())


def test_what_an_actor_could_not_write_is_told_in_a_line(tmp_path: Path) -> None:
    """Wrong: the error of the actor that writes the figures is told with its traceback, or without
    the file and the way out."""
    full = RayTaskError(
        "metrics",
        "Traceback:\n  File x\nOSError: [Errno 28] No space left",
        OSError(28, "No space left"),
    ).as_instanceof_cause()
    folder = write(tmp_path, 7)
    with pytest.raises(UserError) as told, Checkpoints(tmp_path).writing("metrics.jsonl"):
        raise full
    assert str(told.value) == (
        f"metrics.jsonl could not be written (OSError: [Errno 28] No space left); the last good checkpoint is {folder}. Make room, or mend what is "
        "named, and give the command again"
    )
