"""Ray jobs: run any command of run.py on a cluster, follow its log, end as it ends.

Code goes up, data does not: relative folders lie below EXFM_HOME on the cluster
(exfm_ray/storage/paths.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.upload import staged
from exfm_ray.errors import UserError
from exfm_ray.runtime.session import restrict_token_file

LOCAL = "http://127.0.0.1:8265"
"""Where a tunnel (`ray dashboard`, `kubectl port-forward`) leads to the head."""
STOPPED = 130
POLL_S = 1.0
STOP_S = 60.0
"""Longest wait for a job to end that was told to."""
LOST_S = 120.0
"""How long a head that no longer answers is asked again."""
CHATTY = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
UNREACHABLE = (OSError, RuntimeError, aiohttp.ClientError)


def submit(
    address: str | None,
    name: str | None,
    command: Sequence[str],
) -> int:
    """Run a command of run.py as a Ray job and print its log; returns the exit code it had, 130
    where it was stopped.

    A name stands for a run that is to end once: each submission under it is an attempt (`name`,
    `name.2`, ...) that goes on where the last one stopped. Ray does not support an id's reuse, not
    even after the job's deletion.
    """
    client = connect(address)
    attempt = _next_attempt(client, name) if name else None
    with staged(command) as folder:
        entry = shlex.join(["python", "run.py", *command])
        job: str = client.submit_job(
            entrypoint=entry, submission_id=attempt, runtime_env={"working_dir": str(folder)}
        )
    print(f"job {job}: {entry}", file=sys.stderr)
    ended: Future[Any] = Future()
    Thread(target=_follow_into, args=(ended, client, job), daemon=True).start()
    try:
        details = ended.result()
    except (
        KeyboardInterrupt
    ):  # it comes here and nowhere else: asyncio and callbacks of the connection may swallow one
        print(
            f"job {job} goes on; `ray job logs --follow {job}` follows it, `run.py submit --stop {name or job}` stops it",
            file=sys.stderr,
        )
        return STOPPED
    if details.status == JobStatus.FAILED and details.driver_exit_code is None:
        print(f"job {job}: {details.message}", file=sys.stderr)
    return exit_code(details)


def stop(address: str | None, name: str) -> None:
    """Stop a job, and wait until it has ended."""
    client = connect(address)
    attempts = _attempts(client, name)
    if not attempts:
        raise UserError(f"the cluster knows no job '{name}'; `ray job list` shows all")
    job = attempts[-1].submission_id
    status = attempts[-1].status
    if not status.is_terminal():
        client.stop_job(job)
    ends = time.monotonic() + STOP_S
    while not (status := client.get_job_status(job)).is_terminal():
        if time.monotonic() > ends:
            raise UserError(f"job '{job}' has not ended within {STOP_S:.0f} s; it is {status}")
        time.sleep(POLL_S)
    print(f"job {job}: {status.lower()}")


def connect(address: str | None) -> Any:
    """A client of the job server at `address`, else at RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else
    at the end of a tunnel here."""
    if address or not (os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")):
        os.environ["RAY_API_SERVER_ADDRESS"] = (
            address or LOCAL
        )  # Ray lets the environment win over its argument
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    restrict_token_file()
    try:
        return JobSubmissionClient()
    except AuthenticationError:
        raise UserError(
            f"{_asked()} refuses the token, or got none: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file of the cluster's "
            "token if that is not ~/.ray/auth_token"
        ) from None
    except (OSError, ValueError, aiohttp.ClientError) as error:
        raise UserError(
            f"no Ray job server answers at {_asked()}: {error}; is the tunnel open, the address right?"
        ) from None


def _asked() -> str:
    return os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ["RAY_ADDRESS"]


def _attempts(client: Any, name: str) -> list[Any]:
    """Details of the jobs `name`, `name.2`, ... in order."""
    found = {}
    for details in client.list_jobs():
        match = re.fullmatch(re.escape(name) + r"(?:\.(\d+))?", details.submission_id or "")
        if match:
            found[int(match[1] or 1)] = details
    return [found[number] for number in sorted(found)]


def _next_attempt(client: Any, name: str) -> str:
    """The id of the next attempt; UserError where one is running."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"--id {name}: letters, digits, '_' and '-' only")
    attempts = _attempts(client, name)
    if not attempts:
        return name
    last = attempts[-1]
    if not last.status.is_terminal():
        raise UserError(
            f"job '{last.submission_id}' is {last.status.lower()}: follow it with `ray job logs --follow {last.submission_id}`, stop it with "
            f"`run.py submit --stop {name}`, or choose another --id"
        )
    number = last.submission_id.removeprefix(name).removeprefix(".") or 1
    return f"{name}.{int(number) + 1}"


def _follow_into(
    ended: Future[Any],
    client: Any,
    job: str,
) -> None:
    """Give `ended` what `follow` returns or raises."""
    try:
        ended.set_result(follow(client, job))
    except BaseException as error:
        ended.set_exception(error)


def follow(client: Any, job: str) -> Any:
    """Print a job's log until the job has ended; its details. A lost connection is opened again."""
    log = Log(client, job)
    lost = None
    while True:
        try:
            details = client.get_job_info(job)
            lost = None
            asyncio.run(log.tail())
            if (
                details.status.is_terminal()
            ):  # before the log was read, so it has been read to its end
                return details
        except UNREACHABLE as error:
            lost = lost or time.monotonic()
            if time.monotonic() - lost > LOST_S:
                raise UserError(
                    f"lost the connection to {_asked()} ({error}); job {job} may be running: `ray job status {job}`"
                ) from None
        time.sleep(POLL_S)


class Log:
    """A job's log on stdout: each character once, however often it is read from its start."""

    def __init__(self, client: Any, job: str) -> None:
        self._client = client
        self._job = job
        self._printed = 0

    async def tail(self) -> None:
        """Print what is new until the job ends or the connection does."""
        read = 0
        async for chunk in self._client.tail_job_logs(self._job):
            new = chunk[max(0, self._printed - read) :]
            read += len(chunk)
            self._printed = max(self._printed, read)
            print(new, end="", flush=True)


def exit_code(details: Any) -> int:
    """The exit code of a command whose job has ended so: its own, as a shell gives it; 130 where it
    was stopped."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED
    code = details.driver_exit_code or 1
    return int(code if code > 0 else 128 - code)
