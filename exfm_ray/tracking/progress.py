"""Progress of long work: bars in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0


class ProgressView:
    """Shows for each job its window, its examples/s and the time left. Use as a context manager."""

    def __init__(self, totals: Mapping[str, int | None]) -> None:
        """`totals`: examples that each job has to do in this process; None where nobody knows
        yet."""
        self._totals = dict(totals)
        self._printed = time.monotonic()
        self._first: dict[
            str, tuple[float, int]
        ] = {}  # when a job was first seen at work, and what it had done by then
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
        """True when a person looks."""
        return sys.stderr.isatty()

    def __enter__(self) -> ProgressView:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, state: Mapping[str, tuple[int, int]]) -> None:
        """Show where the jobs are: job -> (window, examples done)."""
        now = time.monotonic()
        for job, (window, done) in state.items():
            self._bars.update(
                self._tasks[job], completed=done, window=window, speed=self._speed(job, done, now)
            )
        if not self.terminal and now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            line = " | ".join(
                self._line(job, *state[job], now) for job in self._totals if job in state
            )
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
        left = f", {(total - done) / speed:.0f} s left" if total is not None and speed else ""
        return f"{job}: window {window}, {speed:,.0f} examples/s{left}"

    def _speed(
        self,
        job: str,
        done: int,
        now: float,
    ) -> float:
        """Examples/s since the job was first seen at work: its start is not counted."""
        since, before = self._first.setdefault(job, (now, done))
        return (done - before) / (now - since) if now > since else 0.0
