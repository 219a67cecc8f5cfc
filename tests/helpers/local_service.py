"""The labeling service in this process, without Ray.

One scorer replaces the pool of actors, so tests of the service's decisions are fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from exfm_ray.das import scheduler, snapshot_selector
from exfm_ray.das.client import failure_message
from exfm_ray.das.pool import Completion
from exfm_ray.das.queue import ScoreTask
from exfm_ray.das.scorer import Scorer
from exfm_ray.das.service import Service
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.errors import UserError

WAIT_S = 30
CLIENT = "test"
Local = Callable[..., Service]


class LocalPool:
    """A pool of one scorer that finishes each task at once."""

    def __init__(self, spec: LabelingSpec) -> None:
        self._scorer = Scorer(spec)
        self._completions: list[Completion] = []
        self.slots = []

    def resize(self, fragments: int) -> None:
        """Keep the one scorer."""

    def submit(self, task: ScoreTask) -> bool:
        """Score the task here; errors come back as they do from an actor."""
        try:
            result = self._scorer.score(task.window, task.fragment, task.version)
            completion = Completion(task, result)
        except Exception as error:
            completion = Completion(task, error=error)
        self._completions.append(completion)
        return True

    def has(self, window: int) -> bool:
        """Return False, because no task is pending."""
        return False

    def wait(self, timeout_s: float) -> list[Any]:
        """Return no references, because all tasks are finished."""
        time.sleep(0.0 if self._completions else 0.01)
        return []

    def collect(self, ready: Sequence[Any]) -> list[Completion]:
        """Return all completions since the last call."""
        completions = self._completions
        self._completions = []
        return completions


@contextmanager
def local_services(patch: pytest.MonkeyPatch) -> Iterator[Local]:
    """Start services whose threads run in this process and poll often; they end with the block."""
    started: list[Service] = []
    patch.setattr(snapshot_selector, "DEBOUNCE_S", 0.0)
    patch.setattr(scheduler, "SCAN_S", 0.02)

    def start(spec: LabelingSpec, **options: bool) -> Service:
        patch.setattr(scheduler, "Pool", lambda *arguments: LocalPool(spec))
        started.append(Service(spec, **options))
        return started[-1]

    yield start
    for service in started:
        service.close()


def until(holds: Callable[[], Any]) -> Any:
    """Wait until a condition holds, and return its value."""
    deadline = time.monotonic() + WAIT_S
    while not (value := holds()):
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.01)
    return value


def finish(
    service: Service,
    spec: LabelingSpec,
    windows: Sequence[int],
) -> dict[int, int]:
    """Request windows and wait for them as a client does; return the rows scored in each."""
    before = (service.progress(CLIENT) or {"rows": {}})["rows"]
    service.ask(CLIENT, windows)

    def progress() -> Any:
        report = service.progress(CLIENT)
        assert report
        return report

    def unfinished() -> set[int]:
        return set(windows) - progress()["committed"]

    until(lambda: unfinished() <= progress()["failed"].keys())
    if unfinished():
        failed = progress()["failed"]
        raise UserError(failure_message(spec, {window: failed[window] for window in unfinished()}))
    return {
        window: rows - before.get(window, 0)
        for window, rows in progress()["rows"].items()
        if rows > before.get(window, 0)
    }
