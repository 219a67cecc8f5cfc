"""When which role worked on which window, on a clock that stops while no role works."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PAUSE_S = 5.0
"""Longer times in which no role works are cut out.

Examples are the start of Ray and of the workers, and the days between a kill and the next command.
"""


@dataclass(frozen=True)
class Bar:
    """A phase of a role on one window, or the wait before it.

    Attributes:
        start: seconds of work since the first one, without pauses.
        end: likewise.
    """

    role: str
    window: int
    phase: str
    start: float
    end: float


def bars(spans: Sequence[Mapping[str, Any]]) -> tuple[list[Bar], float]:
    """Turn the rows of a timeline into bars.

    A row has the length of its phase's wait, not its time. Nearly all of it is for the window's
    first block, so the wait is placed first.

    Returns:
        The bars in order of time, and the seconds that were cut out.
    """
    busy = [(_work_start(span), span["ended_s"]) for span in spans]
    clock, pauses_s = _clock(busy)
    result = []
    for span in sorted(spans, key=lambda span: span["started_s"]):
        role = span["role"]
        window = span["window"]
        start = clock(span["started_s"])
        work_start = clock(_work_start(span))
        end = clock(span["ended_s"])
        if work_start > start:
            wait = Bar(role, window, "waiting", start, work_start)
            result.append(wait)
        work = Bar(role, window, span["phase"], work_start, end)
        result.append(work)
    return result, pauses_s


def _work_start(span: Mapping[str, Any]) -> float:
    """When the work of a phase started, after its wait; seconds since the epoch."""
    start: float = span["started_s"] + span["waited_s"]
    return start


def _clock(busy: Sequence[tuple[float, float]]) -> tuple[Callable[[float], float], float]:
    """A clock that starts with the first work and stops in pauses.

    Args:
        busy: start and end of each work, in seconds.

    Returns:
        A function from real to shown seconds, and the seconds of all pauses.
    """
    if not busy:
        return lambda at: 0.0, 0.0
    start_N, end_N = np.array(sorted(busy)).T
    last_end_N = np.maximum.accumulate(end_N)
    gap_N = start_N[1:] - last_end_N[:-1]
    pause_N = np.where(gap_N > PAUSE_S, gap_N, 0.0)

    # Real -> shown time is linear between the ends of pauses, and constant in pauses.
    pause_ends_N2 = np.stack([last_end_N[:-1], start_N[1:]], axis=1)[pause_N > 0]
    real = np.concatenate([[start_N[0]], pause_ends_N2.ravel(), [last_end_N[-1]]])
    step = np.diff(real)
    step[1::2] = 0.0
    shown = np.concatenate([[0.0], np.cumsum(step)])
    return lambda at: float(np.interp(at, real, shown)), float(pause_N.sum())


def seconds_by_phase(all_bars: Sequence[Bar]) -> dict[str, dict[str, float]]:
    """Role -> phase, including waiting -> seconds."""
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for bar in all_bars:
        phases = totals[bar.role]
        phases[bar.phase] += bar.end - bar.start
    return {role: dict(phases) for role, phases in totals.items()}
