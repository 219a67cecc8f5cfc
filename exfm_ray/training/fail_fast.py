"""Ends a job at a mistake that every restart would meet again. A module of its own, for Ray Train's
controller imports what it calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.train import UserCallback

from exfm_ray.errors import UserError
from exfm_ray.runtime.actors import get_with_timeout


class FailFastCallback(UserCallback):  # type: ignore[misc]  # ray has no types
    """Asks the job's feed, whenever a worker has failed, whether one has met a UserError. An error
    in here is one that Ray Train tries not again."""

    def __init__(self, feed: Any) -> None:
        self._feed = feed

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """UserError with what the worker has told."""
        told = get_with_timeout(
            self._feed.failed.remote(), "the job", "its feed to tell why a worker has failed"
        )
        if told:
            raise UserError(told)
