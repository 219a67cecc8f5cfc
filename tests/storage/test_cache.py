"""Local copies of remote files."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import S3

from exfm_ray.errors import UserError
from exfm_ray.storage import cache
from exfm_ray.storage.atomic import sha256, write_text
from exfm_ray.storage.cache import local_copy, verify_sha256
from exfm_ray.storage.locks import file_lock
from exfm_ray.storage.remote import RemotePath, StorageError

TEXT = "rows"
HASH = hashlib.sha256(TEXT.encode()).hexdigest()


@pytest.fixture
def fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the downloaded files; the copies go into a folder of the test's own."""
    names: list[str] = []
    download = RemotePath.download

    def recorded(self: RemotePath, target: Path) -> None:
        names.append(self.name)
        download(self, target)

    monkeypatch.setattr(RemotePath, "download", recorded)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield names


def test_downloaded_once_per_node(
    s3: S3,
    tmp_path: Path,
    fetches: list[str],
) -> None:
    """Wrong: each process or each use downloads a snapshot's tables again, or sees those of
    another version."""
    path = RemotePath(s3.url(tmp_path.name)) / "a"
    write_text(path, TEXT)
    with ThreadPoolExecutor(4) as threads:
        copies = set(threads.map(lambda _: local_copy(path, HASH), range(8)))
    assert fetches == ["a"] and verify_sha256(path, HASH)
    (copy,) = copies
    assert copy.read_text() == TEXT and copy.parent.stat().st_mode & 0o77 == 0
    write_text(path, "other rows")
    assert local_copy(
        path, hashlib.sha256(b"other rows").hexdigest()
    ).read_text() == "other rows" and fetches == ["a", "a"]


def test_damage_is_seen_and_not_kept(
    s3: S3,
    tmp_path: Path,
    fetches: list[str],
) -> None:
    """Wrong: a damaged file is used, or stays in use after its repair; or a local one is copied."""
    for path in (RemotePath(s3.url(tmp_path.name)) / "a", tmp_path / "a"):
        write_text(path, TEXT)
        assert verify_sha256(path, HASH) and sha256(local_copy(path, HASH)) == HASH
        write_text(path, "row")
        assert not verify_sha256(path, HASH)
        write_text(path, TEXT)
        assert verify_sha256(path, HASH) and local_copy(path, HASH).read_text() == TEXT
        path.unlink()
        assert not verify_sha256(path, HASH)
    write_text(RemotePath(s3.url(tmp_path.name)) / "a", "row")
    with pytest.raises(
        UserError, match=r"s3://tests/.*a: not the file that its manifest describes; it is damaged"
    ):
        local_copy(RemotePath(s3.url(tmp_path.name)) / "a", HASH)
    assert local_copy(tmp_path / "b", HASH) == tmp_path / "b", "a local file is not checked"


def test_a_damaged_copy_is_replaced(
    s3: S3,
    tmp_path: Path,
    fetches: list[str],
) -> None:
    """Wrong: a copy that a full or failing disk has damaged is used as the snapshot."""
    path = RemotePath(s3.url(tmp_path.name)) / "a"
    write_text(path, TEXT)
    local_copy(path, HASH).write_text("rowz")
    assert not verify_sha256(path, HASH) or local_copy(path, HASH).read_text() == TEXT
    assert verify_sha256(path, HASH) and fetches == ["a", "a"]


def test_an_outage_is_not_damage(
    s3: S3,
    tmp_path: Path,
    fetches: list[str],
) -> None:
    """Wrong: while the storage does not answer, an intact snapshot counts as damaged and an older
    one takes its place."""
    path = RemotePath(s3.url(tmp_path.name)) / "a"
    write_text(path, TEXT)
    with s3.refusing(), pytest.raises(StorageError):
        verify_sha256(path, HASH)


def test_a_download_that_hangs_elsewhere_is_reported(
    s3: S3,
    tmp_path: Path,
    fetches: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: processes wait for ever for one that hangs while it downloads, do not wait for it at
    all, or do not name it."""
    monkeypatch.setattr(cache, "DOWNLOAD_TIMEOUT_S", 0.3)
    path = RemotePath(s3.url(tmp_path.name)) / "a"
    write_text(path, TEXT)
    copy = local_copy(path, HASH)
    lock = copy.with_suffix(".lock")
    with file_lock(lock, str):
        started = time.monotonic()
        message = rf"{lock}: waited 0 s for process {os.getpid()} on .*, which downloads the same"
        with pytest.raises(UserError, match=message):
            local_copy(path, HASH)
        assert time.monotonic() - started > 0.3
    assert local_copy(path, HASH) == copy


def test_expired_copies_are_deleted(
    s3: S3,
    tmp_path: Path,
    fetches: list[str],
) -> None:
    """Wrong: the copies of all snapshots of a long run fill the disk, or one in use is
    deleted."""
    folder = RemotePath(s3.url(tmp_path.name))
    for name in ("old", "used", "new"):
        write_text(folder / name, TEXT)
    old = local_copy(folder / "old", HASH)
    used = local_copy(folder / "used", HASH)
    for copy in (old, used):
        os.utime(copy, (0, time.time() - cache.CACHE_TTL_S - 1))
    local_copy(folder / "used", HASH)
    local_copy(folder / "new", HASH)
    assert used.exists() and not old.exists()
