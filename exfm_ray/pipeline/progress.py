"""Watching the roles of a running pipeline from the driver: progress, memory, stalls, failures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exfm_ray.das.client import LabelingFailedError
from exfm_ray.das.labeler import Labeler
from exfm_ray.data.feed import FEED_WAIT_S
from exfm_ray.data.stream import EventStream, Window
from exfm_ray.errors import UserError
from exfm_ray.pipeline.schedule import Workload
from exfm_ray.runtime.actors import get_with_timeout
from exfm_ray.runtime.memory import MemoryMeter
from exfm_ray.tracking.progress import ProgressView
from exfm_ray.training.job import Job

POLL_S = 0.2
STALL_S = 3 * FEED_WAIT_S
"""Longest time in which no role learns or scores a single batch."""

State = dict[str, tuple[int, int]]
"""Role or job name -> (current window, examples done)."""


class ProgressMonitor:
    """Shows progress, samples memory, detects stalls and raises the errors of failed roles.

    Attributes:
        pending: the roles that run in threads of the driver.
        failed_labelings: errors of DASs that finished without some windows.
    """

    def __init__(
        self,
        view: ProgressView,
        recorder: Any,
        memory: MemoryMeter,
        logs: Path,
    ) -> None:
        """Watch a run from now on.

        Args:
            recorder: handle of the `RecorderActor`, which knows the progress of all roles.
            logs: folder that an error message refers to.
        """
        self.pending: dict[Future[None], Job | Labeler] = {}
        self.failed_labelings: list[LabelingFailedError] = []
        self._view = view
        self._recorder = recorder
        self._memory = memory
        self._logs = logs
        self._last_poll = 0.0
        self._last_change = time.monotonic()
        self._last_state: State = {}

    def state(self) -> State:
        """Ask the recorder for the progress of all roles."""
        reply = self._recorder.state.remote()
        state: State = get_with_timeout(reply, "the run", "its recorder")
        return state

    def report_scored(
        self,
        role: str,
        window: int,
        rows: int,
    ) -> None:
        """Record that a DAS has scored `rows` more examples of a window."""
        self._recorder.progress.remote(role, window, rows)

    def poll(self) -> None:
        """Check on all roles, at most every `POLL_S` seconds.

        Raises:
            UserError: no role has made progress for `STALL_S` seconds.
            Exception: the error of a role that has failed.
        """
        now = time.monotonic()
        if now - self._last_poll < POLL_S:
            return
        self._last_poll = now
        self._memory.sample()
        state = self.state()
        self._view.update(state)
        self._check_stall(state, now)
        self._finish_done_roles()

    @contextmanager
    def collect_failed(self) -> Iterator[None]:
        """Keep a `LabelingFailedError` for later: the other roles first do what they can."""
        try:
            yield
        except LabelingFailedError as error:
            self.failed_labelings.append(error)

    def _check_stall(self, state: State, now: float) -> None:
        if state != self._last_state:
            self._last_change = now
            self._last_state = state
        if now - self._last_change <= STALL_S:
            return

        positions = [f"{job} at window {window}" for job, (window, _) in state.items()]
        where = ", ".join(positions) or "none has started"
        raise UserError(
            f"no role has made progress for {STALL_S:.0f} s ({where}); "
            f"are there enough CPUs or GPUs for all roles? Logs: {self._logs}"
        )

    def _finish_done_roles(self) -> None:
        done = [future for future in self.pending if future.done()]
        for future in done:
            del self.pending[future]
            with self.collect_failed():
                future.result()


def examples_left(stream: EventStream, workload: Workload) -> dict[str, int]:
    """The number of examples that each job and each DAS still has to process."""
    windows = {window: stream.window(window) for window in stream.windows()}
    left = {}
    for job in workload.jobs:
        done = job.checkpoints.latest()
        passes = job.passes(workload.learnable[job.name], done)
        rows = 0
        for window_pass in passes:
            if window_pass.purpose == "learn":
                rows += _rows_of_job(stream, windows[window_pass.window], job)
        left[job.name] = rows - done.examples
    for role, to_score in workload.scoring.items():
        left[role] = sum(windows[window].rows for window in to_score)
    return left


def _rows_of_job(
    stream: EventStream,
    window: Window,
    job: Job,
) -> int:
    """The examples of a window that a job reads: those of its students' domains."""
    if not job.students:
        return sum(fragment.rows for fragment in window.fragments)
    domains = [stream.schema.domain_index(student.domain) for student in job.students]
    rows = 0
    for fragment in window.fragments:
        rows += sum(fragment.domain_rows[domain] for domain in domains)
    return rows
