"""When which role worked on which window, on a clock that stands still while none does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PAUSE_S = 5.0
"""Longer times in which no role works are cut out: the start of Ray and of the workers, or the days
between a kill and going on."""


@dataclass(frozen=True)
class Bar:
    """A phase of a role on one window, or the waiting before it; seconds from the first work on,
    without pauses."""

    role: str
    window: int
    phase: str
    start: float
    end: float


def bars(spans: Sequence[Mapping[str, Any]]) -> tuple[list[Bar], float]:
    """The bars of a timeline's rows, in order of time, and the seconds that were cut out.

    A row tells how long its phase waited, not when; nearly all of it is for the window's first
    block, so it stands first.
    """
    clock, cut = _clock([(span["started_s"] + span["waited_s"], span["ended_s"]) for span in spans])
    found = []
    for span in sorted(spans, key=lambda span: span["started_s"]):
        started, working, ended = (
            clock(at)
            for at in (span["started_s"], span["started_s"] + span["waited_s"], span["ended_s"])
        )
        if working > started:
            found.append(Bar(span["role"], span["window"], "waiting", started, working))
        found.append(Bar(span["role"], span["window"], span["phase"], working, ended))
    return found, cut


def _clock(busy: Sequence[tuple[float, float]]) -> tuple[Callable[[float], float], float]:
    """A clock that runs from the first work on and stands still in pauses; the seconds of the
    pauses."""
    if not busy:
        return lambda at: 0.0, 0.0
    start_N, end_N = np.array(sorted(busy)).T
    worked_N = np.maximum.accumulate(end_N)
    gap_N = start_N[1:] - worked_N[:-1]
    cut_N = np.where(gap_N > PAUSE_S, gap_N, 0.0)
    # real time -> shown time, linear between the ends of pauses; before the first work it stands
    # still
    real = np.concatenate(
        [
            [start_N[0]],
            np.stack([worked_N[:-1], start_N[1:]], axis=1)[cut_N > 0].ravel(),
            [worked_N[-1]],
        ]
    )
    step = np.diff(real)
    step[1::2] = 0.0
    shown = np.concatenate([[0.0], np.cumsum(step)])
    return lambda at: float(np.interp(at, real, shown)), float(cut_N.sum())


def seconds(found: Sequence[Bar]) -> dict[str, dict[str, float]]:
    """Role -> phase (waiting, too) -> seconds."""
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for bar in found:
        totals[bar.role][bar.phase] += bar.end - bar.start
    return {role: dict(phases) for role, phases in totals.items()}
