"""Ends a job at an error that every restart would meet again.

It is a module of its own because Ray Train's controller imports the callbacks it calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.train import UserCallback

from exfm_ray.errors import UserError
from exfm_ray.runtime.actors import get_with_timeout


class FailFastCallback(UserCallback):  # type: ignore[misc]  # ray has no types
    """Runs after a worker failure. If the cause was a UserError, raises it.

    Ray Train does not restart a job whose callback raises.
    """

    def __init__(self, feed: Any) -> None:
        """`feed` is the actor to which workers report a UserError."""
        self._feed = feed

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raise the UserError that a worker has reported to the feed, if any."""
        message = get_with_timeout(
            self._feed.failed.remote(), "the job", "its feed to report why a worker has failed"
        )
        if message:
            raise UserError(message)
