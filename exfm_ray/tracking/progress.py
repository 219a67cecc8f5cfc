"""Progress of long work: bars in a terminal, otherwise a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0


class ProgressView:
    """Shows the window, the examples/s and the time left of each job. Use it in a `with` block."""

    def __init__(self, totals: Mapping[str, int | None]) -> None:
        """Prepare the view.

        Args:
            totals: job -> examples that it has to process; None if the number is unknown.
        """
        self._totals = dict(totals)
        self._printed = time.monotonic()
        # job -> when its work was first seen, and the examples that it had done by then
        self._first: dict[str, tuple[float, int]] = {}
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            TextColumn("window {task.fields[window]:>3}"),
            TextColumn("{task.fields[speed]:>9,.0f} examples/s"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self.terminal,
        )
        self._tasks = {
            job: self._bars.add_task(job, total=total, window=0, speed=0.0)
            for job, total in self._totals.items()
        }

    @property
    def terminal(self) -> bool:
        """Whether stderr is a terminal."""
        return sys.stderr.isatty()

    def __enter__(self) -> ProgressView:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, state: Mapping[str, tuple[int, int]]) -> None:
        """Show the state of the jobs: job -> (window, examples done)."""
        now = time.monotonic()
        for job, (window, done) in state.items():
            task = self._tasks[job]
            speed = self._speed(job, done, now)
            self._bars.update(task, completed=done, window=window, speed=speed)

        is_due = now - self._printed >= PLAIN_EVERY_S
        if is_due and not self.terminal:
            self._printed = now
            self._print_line(state, now)

    def _print_line(self, state: Mapping[str, tuple[int, int]], now: float) -> None:
        parts = []
        for job in self._totals:
            if job in state:
                window, done = state[job]
                parts.append(self._line(job, window, done, now))
        line = " | ".join(parts)
        self._console.print(line, highlight=False, soft_wrap=True)

    def _line(
        self,
        job: str,
        window: int,
        done: int,
        now: float,
    ) -> str:
        total = self._totals[job]
        speed = self._speed(job, done, now)
        if total is not None and done >= total:
            return f"{job}: done"
        line = f"{job}: window {window}, {speed:,.0f} examples/s"
        if total is not None and speed:
            line += f", {(total - done) / speed:.0f} s left"
        return line

    def _speed(
        self,
        job: str,
        done: int,
        now: float,
    ) -> float:
        """Examples/s since the job's work was first seen, so that its start does not count."""
        first_seen, done_before = self._first.setdefault(job, (now, done))
        if now <= first_seen:
            return 0.0
        return (done - done_before) / (now - first_seen)
