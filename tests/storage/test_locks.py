"""Two drivers in the folder of one run, and lock files in general."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from role_locks import role_holder

from exfm_ray.errors import UserError
from exfm_ray.storage.locks import acquire_role_lock, file_lock

pytestmark = pytest.mark.heavy


def test_a_role_is_locked_until_its_process_is_killed(tmp_path: Path) -> None:
    """Wrong: two drivers work on one role; a killed process, or a child that it left behind, keeps
    the lock for ever; a second command of the same process, or the commands of the other roles, are
    refused."""
    with role_holder(tmp_path, "fm", "vm") as other:
        with pytest.raises(
            UserError,
            match=rf"{tmp_path}: process {other.pid} on .* is at work on vm of this run; .*--name",
        ):
            acquire_role_lock(tmp_path, ["das", "vm"])
        acquire_role_lock(tmp_path, ["das"])
        other.kill()
        other.wait()
        acquire_role_lock(tmp_path, ["fm", "vm"])


def test_a_file_lock_ends_with_its_block(tmp_path: Path) -> None:
    """Wrong: two processes are in the block at once, the refusal does not name the process in it,
    or the lock stays after an error in the block."""
    path = tmp_path / "deep" / "a.lock"
    refusal = "held by {}".format
    with pytest.raises(KeyError), file_lock(path, refusal):
        with (
            pytest.raises(UserError, match=rf"held by process {os.getpid()} on "),
            file_lock(path, refusal),
        ):
            pass
        raise KeyError
    with file_lock(path, refusal):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    """Wrong: a run on a shared disk without locks cannot be started."""

    def no_locks(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    acquire_role_lock(tmp_path, ["fm"])
    with file_lock(tmp_path / "a.lock", str):
        pass
