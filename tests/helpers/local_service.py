"""The service in this process, without Ray: the pool's place is taken by one scorer, so that tests
of what it decides take no seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from exfm_ray.das import scheduler as scheduler
from exfm_ray.das import snapshot_selector as snapshot_selector
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
    """One scorer that has done what it is given at once."""

    def __init__(self, order: LabelingSpec) -> None:
        self._scorer = Scorer(order)
        self._came = []
        self.members = []

    def resize(self, fragments: int) -> None:
        """There is one."""

    def submit(self, work: ScoreTask) -> bool:
        """Score it here; errors come back as they do from an actor."""
        try:
            self._came.append(
                Completion(work, self._scorer.score(work.window, work.fragment, work.version))
            )
        except Exception as error:
            self._came.append(Completion(work, error=error))
        return True

    def has(self, window: int) -> bool:
        """Nothing is in hand."""
        return False

    def wait(self, timeout_s: float) -> list[Any]:
        """Nothing takes long."""
        time.sleep(0.0 if self._came else 0.01)
        return []

    def collect(self, ready: Sequence[Any]) -> list[Completion]:
        """All that is done."""
        came = self._came
        self._came = []
        return came


@contextmanager
def local_services(patch: pytest.MonkeyPatch) -> Iterator[Local]:
    """Starts services whose threads run in this process, looking often; they end with the block."""
    started: list[Service] = []
    patch.setattr(snapshot_selector, "DEBOUNCE_S", 0.0)
    patch.setattr(scheduler, "LOOK_S", 0.02)

    def start(order: LabelingSpec, **options: bool) -> Service:
        patch.setattr(scheduler, "Pool", lambda *arguments: LocalPool(order))
        started.append(Service(order, **options))
        return started[-1]

    yield start
    for service in started:
        service.close()


def until(holds: Callable[[], Any]) -> Any:
    """Wait for a condition."""
    started = time.monotonic()
    while not (value := holds()):
        assert time.monotonic() - started < WAIT_S, "it did not come to hold"
        time.sleep(0.01)
    return value


def finish(
    asked: Service,
    order: LabelingSpec,
    windows: Sequence[int],
) -> dict[int, int]:
    """Ask for windows and wait for them as a client does; the rows that were scored of each."""
    before = (asked.progress(CLIENT) or {"rows": {}})["rows"]
    asked.ask(CLIENT, windows)

    def left() -> set[int]:
        told = asked.progress(CLIENT)
        assert told
        return set(windows) - told["committed"]

    def over() -> bool:
        told = asked.progress(CLIENT)
        assert told
        return left() <= told["parked"].keys()

    until(over)
    told = asked.progress(CLIENT)
    assert told
    if left():
        raise UserError(
            failure_message(order, {window: told["parked"][window] for window in left()})
        )
    return {
        window: rows - before.get(window, 0)
        for window, rows in told["rows"].items()
        if rows > before.get(window, 0)
    }
