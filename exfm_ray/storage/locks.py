"""One driver for each role of a run: a second one in the same folder would write its rows a second
time and remove its checkpoints."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import IO

from exfm_ray.errors import UserError

_held: dict[Path, IO[str]] = {}


def acquire_role_lock(folder: Path, roles: Iterable[str]) -> None:
    """Be the one process that drives these roles of the run in `folder`, until this process ends;
    the kernel frees them at any kill.

    A file system without locks holds nobody back. UserError where another process drives one of
    them.
    """
    for role in roles:
        path = (folder / "logs" / f"{role}.lock").absolute()
        if path in _held:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+")
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            who = lock.read() or "another process"
            lock.close()
            raise UserError(
                f"{folder}: {who} is at work on {role} of this run; wait until it has ended, or choose another --name for a run beside it"
            ) from None
        except OSError:
            pass
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        _held[path] = lock
