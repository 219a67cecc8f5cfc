"""A role of a run that another process has locked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def role_holder(folder: Path, *roles: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the locks of some roles; it has a child that outlives it."""
    command = [sys.executable, "-c", HOLDER, str(folder), *roles]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    child_pid = int(process.stdout.readline())
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        subprocess.run(["kill", str(child_pid)], check=True)


REPOSITORY = Path(__file__).parents[2]


HOLDER = """
import subprocess, sys
from pathlib import Path
from exfm_ray.storage.locks import acquire_role_lock
acquire_role_lock(Path(sys.argv[1]), sys.argv[2:])
acquire_role_lock(Path(sys.argv[1]), sys.argv[2:])
child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
sys.stdin.read()
"""
