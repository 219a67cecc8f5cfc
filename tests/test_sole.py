"""Two drivers in one run's folder."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from exfm_ray import sole
from exfm_ray.errors import UserError

REPOSITORY = Path(__file__).parents[1]
HOLDER = """
import subprocess, sys
from pathlib import Path
from exfm_ray.sole import hold
hold(Path(sys.argv[1]), sys.argv[2:])
hold(Path(sys.argv[1]), sys.argv[2:])
heir = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
print(heir.pid, flush=True)
sys.stdin.read()
"""


@contextmanager
def held(folder: Path, *roles: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds roles; it has a child that outlives it."""
    command = [sys.executable, "-c", HOLDER, str(folder), *roles]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    heir = int(process.stdout.readline())
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        subprocess.run(["kill", str(heir)], check=True)


def test_a_role_is_held_until_its_process_is_killed(tmp_path: Path) -> None:
    """Wrong: two drivers work on one role; a killed one, or a process that it has left behind, holds it for ever; a second command of the same
    process, or the other roles' own commands, are held back."""
    with held(tmp_path, "fm", "vm") as other:
        with pytest.raises(UserError, match=rf"{tmp_path}: process {other.pid} on .* is at work on vm of this run; .*--name"):
            sole.hold(tmp_path, ["das", "vm"])
        sole.hold(tmp_path, ["das"])
        other.kill()
        other.wait()
        sole.hold(tmp_path, ["fm", "vm"])


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a run on a shared disk that knows no locks cannot be started."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(sole, "flock", none)
    sole.hold(tmp_path, ["fm"])
