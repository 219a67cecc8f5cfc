"""Lock files that exclude other processes, on this node and on a shared file system.

A lock belongs to its process: the kernel frees it however the process ends, and child processes do
not inherit it. On a file system without locks nothing is excluded and nothing fails.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from exfm_ray.errors import UserError

POLL_S = 0.1
"""Pause between two attempts to take a lock."""

_role_locks: dict[Path, FileLock] = {}
"""The role locks of this process. The references keep the locks until the process ends."""


def acquire_role_lock(folder: Path, roles: Iterable[str]) -> None:
    """Make this process the only driver of some roles of a run until the process ends.

    A second driver of a role would write its rows a second time and remove its checkpoints.

    Args:
        folder: the run's folder; the locks are `logs/<role>.lock` in it.
        roles: roles to lock. Roles that this process has locked already are skipped.

    Raises:
        UserError: another process drives one of the roles; names that process.
    """
    for role in roles:
        path = (folder / "logs" / f"{role}.lock").absolute()
        if path in _role_locks:
            continue
        refusal = partial(_role_refusal, folder, role)
        _role_locks[path] = _acquire(path, refusal, wait_s=0.0)


def _role_refusal(
    folder: Path,
    role: str,
    holder: str,
) -> str:
    return (
        f"{folder}: {holder} is at work on {role} of this run; "
        "wait until it has ended, or choose another --name for a separate run"
    )


@contextmanager
def file_lock(
    path: Path,
    refusal: Callable[[str], str],
    wait_s: float = 0.0,
) -> Iterator[None]:
    """Hold a lock file inside the block.

    Args:
        path: the lock file; it is created if missing and stays.
        refusal: the error message for the name of the process that holds the lock.
        wait_s: longest wait for the lock, in seconds.

    Raises:
        UserError: another process still holds the lock after `wait_s` seconds.
    """
    lock = _acquire(path, refusal, wait_s)
    try:
        yield
    finally:
        lock.release()


def _acquire(
    path: Path,
    refusal: Callable[[str], str],
    wait_s: float,
) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # fails where the folder is not writable; later errors concern the lock alone
    lock = FileLock(
        path,
        timeout=wait_s,
        poll_interval=POLL_S,
        thread_local=False,
        fallback_to_soft=False,  # a soft lock outlives a killed process
    )
    try:
        lock.acquire()
    except Timeout:
        holder = path.read_text() or "another process"
        raise UserError(refusal(holder)) from None
    except OSError:
        return lock  # a file system without locks

    path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return lock
