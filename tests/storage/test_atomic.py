"""Files are complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import (
    atomic_path,
    read_json,
    sha256,
    short_hash,
    write_json,
    write_text,
)


def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    """Wrong: a failed write destroys the old file, shows half of the new one, or leaves litter
    (rule 5)."""
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert read_json(path) == {"a": 1}
        raise KeyError
    assert read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_new_file_replaces_the_old_one(tmp_path: Path) -> None:
    """Wrong: writing twice fails or appends."""
    for text in ("one", "two"):
        write_text(tmp_path / "f", text)
    assert (tmp_path / "f").read_text() == "two"


def test_two_threads_write_the_same_file(tmp_path: Path) -> None:
    """Wrong: two writers of the same file share one temporary file, or the cleanup after a kill
    does not find it."""
    path = tmp_path / "f"
    with atomic_path(path) as one, atomic_path(path) as other:
        one.write_text("one")
        other.write_text("other")
        assert set(tmp_path.glob(".*.tmp")) == {one, other}
    assert path.read_text() == "one"


def test_missing_and_damaged_json_is_named(tmp_path: Path) -> None:
    """Wrong: a damaged file ends in a traceback that does not say which."""
    with pytest.raises(UserError, match=r"none.json: no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(
        UserError, match=r"bad.json: not valid JSON .*run the step that writes it again"
    ):
        read_json(tmp_path / "bad.json")


def test_digests_are_stable(tmp_path: Path) -> None:
    """Wrong: the order of keys, or the machine, changes a digest, and every file seems to have
    another schema."""
    assert short_hash({"a": 1, "b": [2]}) == short_hash({"b": [2], "a": 1}) == "ae8a9a5052464275"
    (tmp_path / "f").write_bytes(b"abc")
    assert (
        sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
