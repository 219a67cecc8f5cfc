"""The timeline's clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import span

from exfm_ray.tracking.timeline import PAUSE_S, Bar, bars, seconds_by_phase


def test_pauses_are_cut_out_and_waiting_comes_first() -> None:
    """Wrong: a run that was resumed a day after a kill is drawn as an empty day and two lines, or
    the start of Ray counts as waiting."""
    spans = [
        span("das", 1, "score", 40.0, 62.0, 60.0),
        span("fm", 0, "learn", 98.0, 3.0, 0.5),
        span("fm", 1, "learn", 90_100.0, 2.0, 0.0),
    ]
    work, cut = bars(spans)
    assert work == [
        Bar("das", 1, "waiting", 0.0, 1.5),
        Bar("das", 1, "score", 1.5, 3.5),
        Bar("fm", 0, "learn", 0.0, 2.5),
        Bar("fm", 1, "learn", 3.5, 5.5),
    ]
    assert cut == pytest.approx(90_100.0 - 102.0)
    assert seconds_by_phase(work) == {"das": {"waiting": 1.5, "score": 2.0}, "fm": {"learn": 4.5}}


def test_no_timeline() -> None:
    """Wrong: a run of an earlier version without a timeline has no report."""
    assert bars([]) == ([], 0.0)


SPANS = st.lists(
    st.tuples(st.integers(0, 400), st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=12
)


@given(SPANS)
def test_work_keeps_its_length_and_order(drawn: list[tuple[int, int, int]]) -> None:
    """Wrong: cutting pauses shortens work, swaps phases, or leaves a pause."""
    spans = [
        span("fm", i, "learn", start / 2, (waited + took) / 2, waited / 2)
        for i, (start, took, waited) in enumerate(drawn)
    ]
    drawn_bars, cut = bars(spans)
    work = {bar.window: bar for bar in drawn_bars if bar.phase == "learn"}
    assert [work[i].end - work[i].start for i in range(len(drawn))] == pytest.approx(
        [took / 2 for _, took, _ in drawn]
    )
    real = {
        i: ((start + waited) / 2, (start + waited + took) / 2)
        for i, (start, took, waited) in enumerate(drawn)
    }
    in_order = sorted(real, key=lambda i: real[i])
    shown = [work[i].start for i in in_order]
    assert shown == sorted(shown) and shown[0] == 0.0
    last = max(bar.end for bar in work.values())
    assert last + cut == pytest.approx(
        max(end for _, end in real.values()) - min(start for start, _ in real.values())
    )
    covered = 0.0
    for bar in sorted(work.values(), key=lambda bar: bar.start):
        assert bar.start - covered <= PAUSE_S + 1e-9
        covered = max(covered, bar.end)
