"""Progress lines without a terminal."""

from __future__ import annotations

import pytest

from exfm_ray.tracking import progress
from exfm_ray.tracking.progress import ProgressView


def test_plain_lines_show_window_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: a log file fills with control characters, or a job's start is counted as slow work."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with ProgressView({"fm": 1000, "prepare": None}) as view:
        now[0] = 150.0  # fifty seconds of start-up
        view.update({"fm": (0, 0), "prepare": (0, 10)})
        now[0] = 160.0
        view.update({"fm": (2, 400), "prepare": (1, 30)})
        now[0] = 171.0
        view.update({"fm": (5, 1000)})
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "fm: window 0, 0 examples/s | prepare: window 0, 0 examples/s"
    assert second == "fm: window 2, 40 examples/s, 15 s left | prepare: window 1, 2 examples/s"
    assert third == "fm: done"
