"""Remote files on this machine: one copy for all processes of the node, checked by its hash.

A local file is its own copy. The copies lie below the folder for temporary files (TMPDIR); one that
nobody has asked for within `CACHE_TTL_S` goes when the next comes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import IO

from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import sha256, short_hash
from exfm_ray.storage.remote import AnyPath, RemotePath

CACHE_TTL_S = 3600.0
FETCH_S = 3600.0
LOOK_S = 0.1
"""Longest wait for another process of this node that fetches the same file, and the pause between
two looks."""


def verify_sha256(path: AnyPath, expected: str) -> bool:
    """True when the file is there and has this SHA-256. A remote one is fetched for that."""
    if isinstance(path, Path):
        return path.exists() and sha256(path) == expected
    try:
        copy = _copy(path, expected)
        if sha256(copy) == expected:
            return True
        copy.unlink()  # a disk has spoilt it
        return sha256(_copy(path, expected)) == expected
    except FileNotFoundError:
        return False


def local_copy(path: AnyPath, expected: str) -> Path:
    """The file on this machine. One that is fetched for this has the SHA-256 `expected`, or it is a
    UserError; a local one is not looked at."""
    if isinstance(path, Path):
        return path
    copy = _copy(path, expected)
    if not copy.exists():
        raise UserError(f"{path}: not the file that its manifest describes; it is damaged")
    return copy


def _copy(path: RemotePath, expected: str) -> Path:
    """The copy of a remote file as it is now, by its time (S3's are whole seconds) and size. A new
    one that has not this SHA-256 is not kept, and `sha256` of it finds no file."""
    there = path.stat()
    copy = _folder() / short_hash(
        [path.root, *path.parts, there.st_mtime_ns, there.st_size, expected]
    )
    with _exclusive(copy.with_suffix(".lock")):
        if copy.exists():
            os.utime(copy)
            return copy
        _forget_old()
        with tempfile.TemporaryDirectory(dir=copy.parent) as folder:
            fresh = Path(folder) / "copy"
            path.download(fresh)
            if sha256(fresh) == expected:
                fresh.replace(copy)
    return copy


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"exfm-ray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder}: belongs to another user; set TMPDIR to a folder of your own")
    return folder


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        deadline = time.monotonic() + FETCH_S
        while not _locked(lock):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{path}: waited {FETCH_S:.0f} s for another process of this node that fetches the same file, and gave up"
                )
            time.sleep(LOOK_S)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _forget_old() -> None:
    """Copies out of use, with their locks."""
    for path in _folder().iterdir():
        with suppress(OSError):
            if path.is_file() and path.stat().st_mtime < time.time() - CACHE_TTL_S:
                path.unlink()
