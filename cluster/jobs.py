"""Ray jobs: run any command on a cluster, print its log, and return its exit code.

The code is uploaded, data are not: relative folders lie below EXFM_HOME on the cluster
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

ENTRY_POINT = ("python", "-m", "exfm_ray")
LOCAL = "http://127.0.0.1:8265"
"""Address of a tunnel to the head (`ray dashboard`, `kubectl port-forward`)."""
STOPPED = 130
"""Exit code of a job that was stopped."""
POLL_S = 1.0
STOP_TIMEOUT_S = 60.0
"""Longest wait for a job to end after it was stopped."""
LOST_S = 120.0
"""How long the client retries while the head does not answer."""
CHATTY_LOGGERS = (
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
    """Run a command as a Ray job and print its log.

    Args:
        address: of the job server; see `connect`.
        name: stands for one run. Each submission under it is an attempt (`name`, `name.2`, ...)
            that resumes the run, because Ray does not support the reuse of an id, not even after
            the job was deleted. None lets Ray choose an id.
        command: the command with its arguments.

    Returns:
        The command's exit code, 130 if the job was stopped or Ctrl-C was pressed here.
    """
    client = connect(address)
    attempt = _next_attempt(client, name) if name else None
    entry = shlex.join([*ENTRY_POINT, *command])
    with staged(command) as folder:
        runtime_env = {"working_dir": str(folder)}
        job: str = client.submit_job(
            entrypoint=entry, submission_id=attempt, runtime_env=runtime_env
        )
    print(f"job {job}: {entry}", file=sys.stderr)

    # A thread follows the job, so Ctrl-C is raised here and nowhere else: asyncio and callbacks of
    # the connection may swallow one.
    ended: Future[Any] = Future()
    Thread(target=_follow_into, args=(ended, client, job), daemon=True).start()
    try:
        details = ended.result()
    except KeyboardInterrupt:
        print(
            f"job {job} continues; `ray job logs --follow {job}` follows it, "
            f"`run.py submit --stop {name or job}` stops it",
            file=sys.stderr,
        )
        return STOPPED
    if details.status == JobStatus.FAILED and details.driver_exit_code is None:
        print(f"job {job}: {details.message}", file=sys.stderr)
    return exit_code(details)


def stop(address: str | None, name: str) -> None:
    """Stop the last attempt of a job and wait until it has ended.

    Raises:
        UserError: there is no such job, or it does not end in time.
    """
    client = connect(address)
    attempts = _attempts(client, name)
    if not attempts:
        raise UserError(f"the cluster knows no job '{name}'; `ray job list` shows all")
    last = attempts[-1]
    job = last.submission_id
    if not last.status.is_terminal():
        client.stop_job(job)
    status = _wait_until_ended(client, job)
    print(f"job {job}: {status.lower()}")


def _wait_until_ended(client: Any, job: str) -> Any:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    status = client.get_job_status(job)
    while not status.is_terminal():
        if time.monotonic() > deadline:
            raise UserError(
                f"job '{job}' has not ended within {STOP_TIMEOUT_S:.0f} s; it is {status}"
            )
        time.sleep(POLL_S)
        status = client.get_job_status(job)
    return status


def connect(address: str | None) -> Any:
    """Return a client of the job server.

    Args:
        address: of the job server; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the end of a
            tunnel on this machine.

    Raises:
        UserError: nothing answers there, or the token is refused.
    """
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if address or not named:
        # Ray prefers the environment to its argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = address or LOCAL
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    restrict_token_file()
    try:
        return JobSubmissionClient()
    except AuthenticationError:
        raise UserError(
            f"{_server_address()} refuses the token, or got none: set RAY_AUTH_MODE=token, "
            "and RAY_AUTH_TOKEN_PATH to the file of the cluster's token "
            "if that is not ~/.ray/auth_token"
        ) from None
    except (OSError, ValueError, aiohttp.ClientError) as error:
        raise UserError(
            f"no Ray job server answers at {_server_address()}: {error}; "
            "is the tunnel open, the address right?"
        ) from None


def _server_address() -> str:
    address = os.environ.get("RAY_API_SERVER_ADDRESS")
    return address or os.environ["RAY_ADDRESS"]


def _attempts(client: Any, name: str) -> list[Any]:
    """Return the details of the jobs `name`, `name.2`, ... in order."""
    pattern = re.escape(name) + r"(?:\.(\d+))?"
    by_number = {}
    for details in client.list_jobs():
        match = re.fullmatch(pattern, details.submission_id or "")
        if match:
            number = int(match[1] or 1)
            by_number[number] = details
    return [by_number[number] for number in sorted(by_number)]


def _next_attempt(client: Any, name: str) -> str:
    """Return the id of the next attempt.

    Raises:
        UserError: an attempt is still running.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"--id {name}: letters, digits, '_' and '-' only")
    attempts = _attempts(client, name)
    if not attempts:
        return name

    last = attempts[-1]
    job = last.submission_id
    if not last.status.is_terminal():
        raise UserError(
            f"job '{job}' is {last.status.lower()}: "
            f"follow it with `ray job logs --follow {job}`, "
            f"stop it with `run.py submit --stop {name}`, or choose another --id"
        )
    number = job.removeprefix(name).removeprefix(".") or 1
    return f"{name}.{int(number) + 1}"


def _follow_into(
    ended: Future[Any],
    client: Any,
    job: str,
) -> None:
    """Store in `ended` what `follow` returns or raises."""
    try:
        details = follow(client, job)
        ended.set_result(details)
    except BaseException as error:
        ended.set_exception(error)


def follow(client: Any, job: str) -> Any:
    """Print a job's log until the job has ended, and return the job's details.

    A lost connection is opened again.

    Raises:
        UserError: the head did not answer for `LOST_S`.
    """
    log = Log(client, job)
    lost_since: float | None = None
    while True:
        try:
            details = client.get_job_info(job)
            lost_since = None
            asyncio.run(log.tail())
            # The status is older than the log that was read, so the log is complete.
            if details.status.is_terminal():
                return details
        except UNREACHABLE as error:
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > LOST_S:
                raise UserError(
                    f"lost the connection to {_server_address()} ({error}); "
                    f"job {job} may be running: `ray job status {job}`"
                ) from None
        time.sleep(POLL_S)


class Log:
    """A job's log on stdout: each character once, however often it is read from its start."""

    def __init__(self, client: Any, job: str) -> None:
        self._client = client
        self._job = job
        self._printed = 0

    async def tail(self) -> None:
        """Print what is new until the job or the connection ends."""
        read = 0
        async for chunk in self._client.tail_job_logs(self._job):
            already_printed = max(0, self._printed - read)
            read += len(chunk)
            self._printed = max(self._printed, read)
            print(chunk[already_printed:], end="", flush=True)


def exit_code(details: Any) -> int:
    """Return the exit code of a job's command as a shell gives it; 130 if the job was stopped."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED
    code = int(details.driver_exit_code or 1)
    if code < 0:  # ended by a signal
        return 128 - code
    return code
