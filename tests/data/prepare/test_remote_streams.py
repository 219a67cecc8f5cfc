"""Streams on S3 have the bytes of local ones, whatever process prepares, dies or fails."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from following import contents, followed, lay_out, make_log
from s3_server import S3
from small_runs import small_config

from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import follow, prepare
from exfm_ray.data.prepare.rollback import rollback_on_error
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import write_text
from exfm_ray.storage.remote import AnyPath, RemotePath


class Killed(BaseException):
    """Simulates a kill: no handler catches it."""


def test_a_killed_follower_ends_with_the_same_bytes(
    s3: S3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: after a kill at any put, events or labels are lost or doubled, or a window differs
    from a local follower's."""
    events, labels = make_log(4, 30, 7)
    lay_out(tmp_path, events, labels, 4)
    put = RemotePath.upload
    left = [0]

    def dies(self: RemotePath, source: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        put(self, source)

    config = followed(tmp_path, "killed", s3.url(tmp_path.name))
    for writes in (9, 21):
        left[0] = writes
        monkeypatch.setattr(RemotePath, "upload", dies)
        with pytest.raises(Killed):
            follow(config)
        monkeypatch.setattr(RemotePath, "upload", put)
    assert contents(follow(config).root) == contents(follow(followed(tmp_path, "whole")).root)


def small(folder: Path, storage: str | None) -> Config:
    """A stream of generated events whose conversions are known later, and corrected."""
    data: dict[str, Any] = {
        "attribution_s": {"conversion": 7200},
        "late_labels": "correct",
        "synthetic": {"windows": 3, "events_per_window": 300},
    }
    return small_config(folder, "run", run={"dir": folder, "storage": storage}, data=data)


def test_two_preparers_write_the_same(s3: S3, tmp_path: Path) -> None:
    """Wrong: two processes that prepare one stream on S3, which no lock keeps apart, leave other
    files than one does on a local disk."""
    configs = [small(tmp_path / name, s3.url(tmp_path.name)) for name in ("one", "two")]
    with ThreadPoolExecutor(2) as threads:
        one, two = threads.map(prepare, configs)
    assert contents(one.root) == contents(two.root) == contents(prepare(small(tmp_path, None)).root)
    assert any(name.startswith("window=002/corrections.") for name in contents(one.root))


def test_files_written_before_an_error_are_removed(s3: S3, tmp_path: Path) -> None:
    """Wrong: refused raw data leave half a stream, or remove files from before."""
    places: list[AnyPath] = [RemotePath(s3.url(tmp_path.name)), tmp_path / "local"]
    for place in places:
        with pytest.raises(UserError, match="bad"), rollback_on_error(place):
            write_text(place / "window=000" / "a", "a")
            raise UserError("bad")
        assert contents(place) == {}
        write_text(place / "kept", "b")
        with pytest.raises(UserError, match="bad"), rollback_on_error(place):
            write_text(place / "window=000" / "a", "a")
            raise UserError("bad")
        assert contents(place) == {"kept": b"b"}
