"""Local copies of remote files: one per node, shared by all processes, checked by SHA-256.

A local file is its own copy. The copies lie below the folder for temporary files (TMPDIR). A copy
that was not used for `CACHE_TTL_S` is deleted when the next file is downloaded.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import sha256, short_hash
from exfm_ray.storage.locks import file_lock
from exfm_ray.storage.remote import AnyPath, RemotePath

CACHE_TTL_S = 3600.0
DOWNLOAD_TIMEOUT_S = 3600.0
"""Longest wait for another process of this node that downloads the same file."""


def verify_sha256(path: AnyPath, expected: str) -> bool:
    """Return True if the file exists and has this SHA-256. A remote file is downloaded first."""
    if isinstance(path, Path):
        return path.exists() and sha256(path) == expected
    try:
        copy = _cached_copy(path, expected)
        if sha256(copy) == expected:
            return True
        copy.unlink()  # the local disk damaged it
        return sha256(_cached_copy(path, expected)) == expected
    except FileNotFoundError:
        return False


def local_copy(path: AnyPath, expected: str) -> Path:
    """Return the file's path on this machine; download a remote file.

    Args:
        path: a local file is returned unchanged and unchecked.
        expected: SHA-256 that a downloaded file must have.

    Raises:
        UserError: the downloaded file has another SHA-256.
    """
    if isinstance(path, Path):
        return path
    copy = _cached_copy(path, expected)
    if not copy.exists():
        raise UserError(f"{path}: not the file that its manifest describes; it is damaged")
    return copy


def _cached_copy(path: RemotePath, expected: str) -> Path:
    """Return the path of the copy; the file is missing if what was downloaded has another SHA-256.

    The copy's name depends on the remote file's time (S3: whole seconds) and size, so a file that
    was overwritten is downloaded again.
    """
    stat = path.stat()
    key = [path.root, *path.parts, stat.st_mtime_ns, stat.st_size, expected]
    copy = _cache_folder() / short_hash(key)
    lock = copy.with_suffix(".lock")

    def refusal(holder: str) -> str:
        return (
            f"{lock}: waited {DOWNLOAD_TIMEOUT_S:.0f} s for {holder}, "
            "which downloads the same file, and gave up"
        )

    with file_lock(lock, refusal, DOWNLOAD_TIMEOUT_S):
        if copy.exists():
            os.utime(copy)
            return copy
        _evict_expired()
        with tempfile.TemporaryDirectory(dir=copy.parent) as folder:
            download = Path(folder) / "copy"
            path.download(download)
            if sha256(download) == expected:
                download.replace(copy)
    return copy


def _cache_folder() -> Path:
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"exfm-ray-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.stat().st_uid
    if owner != user:
        raise UserError(f"{folder}: belongs to another user; set TMPDIR to a folder of your own")
    return folder


def _evict_expired() -> None:
    """Delete copies that were not used recently, with their lock files."""
    oldest = time.time() - CACHE_TTL_S
    for path in _cache_folder().iterdir():
        with suppress(OSError):
            is_expired = path.stat().st_mtime < oldest
            if is_expired and path.is_file():
                path.unlink()
