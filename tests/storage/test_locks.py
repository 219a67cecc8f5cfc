"""Two drivers in one run's folder."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from role_locks import held

from exfm_ray.errors import UserError
from exfm_ray.storage import locks as sole


def test_a_role_is_held_until_its_process_is_killed(tmp_path: Path) -> None:
    """Wrong: two drivers work on one role; a killed one, or a process that it has left behind,
    holds it for ever; a second command of the same process, or the other roles' own commands, are
    held back."""
    with held(tmp_path, "fm", "vm") as other:
        with pytest.raises(
            UserError,
            match=rf"{tmp_path}: process {other.pid} on .* is at work on vm of this run; .*--name",
        ):
            sole.acquire_role_lock(tmp_path, ["das", "vm"])
        sole.acquire_role_lock(tmp_path, ["das"])
        other.kill()
        other.wait()
        sole.acquire_role_lock(tmp_path, ["fm", "vm"])


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a run on a shared disk that knows no locks cannot be started."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(sole, "flock", none)
    sole.acquire_role_lock(tmp_path, ["fm"])
