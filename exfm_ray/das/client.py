"""The clients' end of the service: it is found by its name, or started; a service that dies is
started again and asked again."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence, Set
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
    """Windows that could not be labelled; all others are."""


def connect(
    order: LabelingSpec,
    detached: bool = False,
    follow: bool = False,
) -> Any:
    """The service that carries out `order`: the one that runs, or a new one; `detached`: it
    outlives the process that starts it.

    UserError where one runs that labels the same store otherwise.
    """
    service = _found(order, detached, follow)
    check_compatible(service, order, detached)
    return service


def _found(
    order: LabelingSpec,
    detached: bool = False,
    follow: bool = False,
) -> Any:
    """A handle, at once: the service may be starting still. Without a handle to it a service that
    is not lasting ends."""
    options = {
        "name": order.name,
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached" if detached else None,
    }
    return ServiceActor.options(**options).remote(order, detached, follow)


def check_compatible(
    service: Any,
    order: LabelingSpec,
    detached: bool = False,
) -> None:
    """UserError where a service labels otherwise."""
    found, lasts = ray.get(service.order.remote(), timeout=RPC_TIMEOUT_S)
    if difference := order.first_difference(found):
        raise UserError(
            f"a DAS with other settings is at work on {order.store.root} ({difference}); end it with `run.py das stop`"
        )
    if detached and not lasts:
        raise UserError(
            f"a pipeline's own DAS is at work on {order.store.root}; start the service when that has ended"
        )


def services() -> dict[str, Any]:
    """Name -> handle of all services that run in this cluster."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    names = sorted(
        row["name"]
        for row in listed
        if row["namespace"] == NAMESPACE and row["name"].startswith("das ")
    )
    return {name: ray.get_actor(name, NAMESPACE) for name in names}


def end(service: Any) -> None:
    """End a service with its actors, at once; nothing is lost."""
    ray.kill(service, no_restart=True)


def label(
    order: LabelingSpec,
    windows: Sequence[int],
    progress: Callable[[int, int], None],
    watch: Callable[[], None],
) -> None:
    """Have windows labelled and wait for all of them.

    Args:
        progress: told of rows that were scored: window, rows.
        watch: called all the time; it raises to end the wait.

    Raises:
        LabelingFailedError: some windows could not be labelled; all others are, but for those that
            wait for readers of these.
    """
    client = uuid.uuid4().hex
    left = set(windows)
    seen = dict.fromkeys(windows, 0)
    service = None
    agreed = False
    try:
        while left:
            try:
                if service is None:
                    service = _found(order)
                    agreed = False
                if not agreed:
                    check_compatible(service, order)
                    agreed = True
                told = ray.get(service.progress.remote(client), timeout=RPC_TIMEOUT_S)
                if told is None:
                    ray.get(service.ask.remote(client, left), timeout=RPC_TIMEOUT_S)
                    seen = dict.fromkeys(windows, 0)
                    continue
            except (
                GetTimeoutError
            ):  # it is slow to start or to answer: to let go of it would end it
                watch()
                continue
            except RayActorError as error:  # killed, or its owner has ended: it is asked anew
                if getattr(error, "actor_init_failed", False):
                    raise
                service = None
                watch()
                time.sleep(POLL_S)
                continue
            for window, rows in told["rows"].items():
                if rows > seen.get(window, rows):  # another client's windows are not counted
                    progress(window, rows - seen[window])
                    seen[window] = rows
            left -= told["committed"]
            lost = told["parked"].keys() & left
            if left and left <= lost | out_of_reach(order, left, lost):
                raise LabelingFailedError(
                    failure_message(order, {window: told["parked"][window] for window in lost})
                )
            watch()
            time.sleep(POLL_S if left else 0)
    finally:
        if service is not None and agreed:
            _leave(service, client)


def out_of_reach(
    order: LabelingSpec,
    windows: Set[int],
    parked: Set[int],
) -> set[int]:
    """Of these windows those that will never be labelled: with das.max_windows_ahead a window waits
    for readers, which learn none from a parked one on."""
    if order.das.max_windows_ahead is None or not order.readers or not parked:
        return set()
    return {window for window in windows if window >= min(parked) + order.das.max_windows_ahead}


def failure_message(order: LabelingSpec, causes: dict[int, str]) -> str:
    """Which windows have no supervision, and why the first has none."""
    first = min(causes)
    numbers = ", ".join(map(str, sorted(causes)))
    return f"{causes[first]}; no supervision of window(s) {numbers} by '{order.store.teacher}'; run the same command again when it is repaired"


def _leave(service: Any, client: str) -> None:
    """The last one to leave a service that is not lasting ends it."""
    with suppress(RayActorError, GetTimeoutError):
        if ray.get(service.leave.remote(client), timeout=RPC_TIMEOUT_S):
            end(service)
