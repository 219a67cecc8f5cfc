"""The clients' side of the service: find it by its name, start it, and ask it to label windows.

A service that dies is started and asked again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from exfm_ray.das.service import ServiceActor
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.errors import UserError

NAMESPACE = "exfm"
POLL_S = 0.1
RPC_TIMEOUT_S = 60.0
"""Longest wait for one answer of a service."""


class LabelingFailedError(UserError):
    """Some windows could not be labeled; all others are."""


def connect(
    spec: LabelingSpec,
    detached: bool = False,
    follow: bool = False,
) -> Any:
    """Return the service that carries out `spec`: the running one, or a new one.

    Args:
        spec: what the service labels.
        detached: a new service outlives the process that starts it.
        follow: a new service also labels windows that appear later.

    Raises:
        UserError: a service with other settings is running on the same store.
    """
    service = _get_or_start(spec, detached, follow)
    check_compatible(service, spec, detached)
    return service


def _get_or_start(
    spec: LabelingSpec,
    detached: bool = False,
    follow: bool = False,
) -> Any:
    """Return a handle at once, maybe before the service is up.

    A service that is not detached ends when the last handle to it is gone.
    """
    actor = ServiceActor.options(
        name=spec.name,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached" if detached else None,
    )
    return actor.remote(spec, detached, follow)


def check_compatible(
    service: Any,
    spec: LabelingSpec,
    detached: bool = False,
) -> None:
    """Raise a UserError if a service labels with other settings, or ends with a pipeline."""
    running, is_detached = ray.get(service.spec.remote(), timeout=RPC_TIMEOUT_S)
    root = spec.store.root
    difference = spec.first_difference(running)
    if difference:
        raise UserError(
            f"a DAS with other settings is at work on {root} ({difference}); "
            "end it with `run.py das stop`"
        )
    if detached and not is_detached:
        raise UserError(
            f"a pipeline's own DAS is at work on {root}; start the service when that has ended"
        )


def services() -> dict[str, Any]:
    """Return the handles of all services in this cluster, by name."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    service_names = sorted(name for name in names if name.startswith("das "))
    return {name: ray.get_actor(name, NAMESPACE) for name in service_names}


def end(service: Any) -> None:
    """End a service and its actors at once. Nothing is lost."""
    ray.kill(service, no_restart=True)


def label(
    spec: LabelingSpec,
    windows: Sequence[int],
    progress: Callable[[int, int], None],
    watch: Callable[[], None],
) -> None:
    """Have windows labeled and wait for all of them.

    Args:
        spec: what the service labels.
        windows: the windows.
        progress: called with a window and the number of its rows that were scored since the last
            call.
        watch: called all the time; raises an error to end the wait.

    Raises:
        LabelingFailedError: some windows could not be labeled. All others are, except those that
            wait for readers of the failed ones.
    """
    session = _Session(spec, windows)
    try:
        while session.remaining:
            status = session.poll()
            if status is not None:
                session.report(status["rows"], progress)
                session.remaining -= status["committed"]
                session.check_failed(status["failed"])
            watch()
            if session.remaining:
                time.sleep(POLL_S)
    finally:
        session.leave()


class _Session:
    """One client's request: the windows that are left of it, and the service that has it.

    Attributes:
        remaining: windows that are not labeled yet.
    """

    def __init__(self, spec: LabelingSpec, windows: Sequence[int]) -> None:
        self.remaining = set(windows)
        self._spec = spec
        self._client = uuid.uuid4().hex
        self._windows = tuple(windows)
        self._reported = dict.fromkeys(windows, 0)
        self._service: Any = None
        self._is_compatible = False

    def poll(self) -> dict[str, Any] | None:
        """Ask the service for its progress (see `Scheduler.progress`).

        Returns None if the service does not answer yet, has died, or has just got the request.
        """
        try:
            return self._request_progress()
        except GetTimeoutError:
            # It is slow to start or to answer. Keep the handle: without it the service would end.
            return None
        except RayActorError as error:  # killed, or its owner has ended: start and ask it again
            if getattr(error, "actor_init_failed", False):
                raise
            self._service = None
            return None

    def _request_progress(self) -> dict[str, Any] | None:
        if self._service is None:
            self._service = _get_or_start(self._spec)
            self._is_compatible = False
        service = self._service
        if not self._is_compatible:
            check_compatible(service, self._spec)
            self._is_compatible = True

        status: dict[str, Any] | None = ray.get(
            service.progress.remote(self._client), timeout=RPC_TIMEOUT_S
        )
        if status is None:  # this process of the service does not know the request
            ray.get(service.ask.remote(self._client, self.remaining), timeout=RPC_TIMEOUT_S)
            self._reported = dict.fromkeys(self._windows, 0)
        return status

    def report(self, rows: Mapping[int, int], progress: Callable[[int, int], None]) -> None:
        """Report the rows scored since the last call; other clients' windows are not reported."""
        for window, scored in rows.items():
            reported = self._reported.get(window)
            if reported is not None and scored > reported:
                progress(window, scored - reported)
                self._reported[window] = scored

    def check_failed(self, causes: Mapping[int, str]) -> None:
        """Raise a `LabelingFailedError` if nothing of the request can be labeled any more.

        Args:
            causes: the windows that have failed for good, and why.
        """
        failed = causes.keys() & self.remaining
        hopeless = failed | out_of_reach(self._spec, self.remaining, failed)
        if self.remaining and self.remaining <= hopeless:
            failed_causes = {window: causes[window] for window in failed}
            raise LabelingFailedError(failure_message(self._spec, failed_causes))

    def leave(self) -> None:
        """Withdraw the request. The last client to leave ends a service that is not detached."""
        service = self._service
        if service is None or not self._is_compatible:
            return
        with suppress(RayActorError, GetTimeoutError):
            is_idle = ray.get(service.leave.remote(self._client), timeout=RPC_TIMEOUT_S)
            if is_idle:
                end(service)


def out_of_reach(
    spec: LabelingSpec,
    windows: Set[int],
    failed: Set[int],
) -> set[int]:
    """Return those of `windows` that will never be labeled because others have failed.

    With das.max_windows_ahead a window waits for readers, and these stop at a failed window.
    """
    ahead = spec.das.max_windows_ahead
    if ahead is None or not spec.readers or not failed:
        return set()
    first_blocked = min(failed) + ahead
    return {window for window in windows if window >= first_blocked}


def failure_message(spec: LabelingSpec, causes: Mapping[int, str]) -> str:
    """Say which windows have no supervision, and why the first has none."""
    windows = sorted(causes)
    numbers = ", ".join(map(str, windows))
    return (
        f"{causes[windows[0]]}; no supervision of window(s) {numbers} by '{spec.store.teacher}'; "
        "rerun the same command when it is repaired"
    )
