"""Which checkpoint folders a job resumes from, which it sets aside, and its messages."""

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
    """Wrong: a disk error or a missing permission ends the run despite a good older checkpoint."""
    write(tmp_path, 1)
    spoil(write(tmp_path, 2))
    (message,) = Checkpoints(tmp_path).set_aside_damaged()
    assert "windows=002 is damaged (it cannot be read: [Errno " in message
    assert "training resumes from windows=001" in message
    assert Checkpoints(tmp_path).latest() == Cursor(1)
    assert (tmp_path / "damaged.windows=002").is_dir()


def test_a_lost_manifest_is_reported(tmp_path: Path) -> None:
    """Wrong: a checkpoint without its manifest vanishes silently, or an older one is reported."""
    write(tmp_path, 2)
    for name in ("windows=001", "windows=002.examples=00000064", "windows=1000", "windows=old"):
        (tmp_path / name).mkdir()
    messages = list(Checkpoints(tmp_path).set_aside_damaged())
    folders = [
        message.partition(" has no manifest.json and is not used: ")[0].rpartition("/")[2]
        for message in messages
    ]
    assert folders == ["windows=002.examples=00000064", "windows=1000"]
    assert all("training resumes from windows=002" in message for message in messages)
    assert Checkpoints(tmp_path).latest() == Cursor(2)


def test_without_any_manifest_the_job_starts_from_the_beginning(tmp_path: Path) -> None:
    """Wrong: the first checkpoint's folder, half-written by a killed run, is resumed from."""
    (tmp_path / "windows=001").mkdir()
    (message,) = Checkpoints(tmp_path).set_aside_damaged()
    assert "training starts from the beginning" in message
    assert Checkpoints(tmp_path).latest() == Cursor(0)
    assert not list(Checkpoints(tmp_path / "none").set_aside_damaged())


def test_an_actors_write_error_is_one_line(tmp_path: Path) -> None:
    """Wrong: the error of the actor that writes the figures shows its traceback, or not the file
    and the remedy."""
    full = RayTaskError(
        "metrics",
        "Traceback:\n  File x\nOSError: [Errno 28] No space left",
        OSError(28, "No space left"),
    ).as_instanceof_cause()
    folder = write(tmp_path, 7)
    with pytest.raises(UserError) as raised, Checkpoints(tmp_path).writing("metrics.jsonl"):
        raise full
    assert str(raised.value) == (
        "metrics.jsonl could not be written (OSError: [Errno 28] No space left); "
        f"the last good checkpoint is {folder}. "
        "Free disk space or fix the cause, then rerun the same command to resume"
    )
