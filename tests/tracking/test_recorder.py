"""metrics.jsonl: each row once, even after a kill in the middle of a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import append_jsonl, read_jsonl
from exfm_ray.tracking.recorder import Recorder, read_metrics, read_timeline


def row(
    window: int,
    ne: float = 0.5,
    **changes: Any,
) -> dict[str, Any]:
    identity = {
        "window": window,
        "role": "vm",
        "model": "m",
        "arm": "kd",
        "domain": "d",
        "task": "t",
        "seed": 0,
    }
    figures = dict.fromkeys(("auc", "gauc", "log_loss", "calibration", "label_rate", "examples"))
    return identity | figures | {"ne": ne} | changes


def test_each_row_once(tmp_path: Path) -> None:
    """Wrong: a resumed job writes the window before its checkpoint again, and averages count it
    twice."""
    path = tmp_path / "run" / "metrics.jsonl"
    Recorder(path).metrics([row(0), row(1)])
    resumed = Recorder(path)
    resumed.metrics([row(1, ne=0.6), row(2), row(2, arm="ah")])
    resumed.metrics([row(2)])
    assert read_metrics(path) == [row(0), row(1), row(2), row(2, arm="ah")]


def test_a_line_cut_short_is_written_again(tmp_path: Path) -> None:
    """Wrong: after a kill in the middle of a line the file cannot be read, that row is lost, or
    another is appended to it."""
    path = tmp_path / "metrics.jsonl"
    Recorder(path).metrics([row(0), row(1)])
    path.write_bytes(path.read_bytes()[:-9])
    torn = path.read_bytes()
    assert read_metrics(path) == [row(0)] and path.read_bytes() == torn, (
        "reading must not write: a run may be writing there"
    )
    Recorder(path).metrics([row(1), row(2)])
    assert read_metrics(path) == [row(0), row(1), row(2)]


def test_writes_no_nan(tmp_path: Path) -> None:
    """Wrong: a NaN is written, so that the file is not JSON."""
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(ValueError, match="not JSON compliant"):
        Recorder(path).metrics([row(0, ne=float("nan"))])
    assert read_metrics(path) == []


def test_progress_adds_up(tmp_path: Path) -> None:
    """Wrong: the progress is that of the last batch instead of all batches."""
    recorder = Recorder(tmp_path / "metrics.jsonl")
    recorder.progress("fm", 0, 10)
    recorder.progress("fm", 1, 5)
    recorder.progress("das", 0, 7)
    assert recorder.state() == {"fm": (1, 15), "das": (0, 7)}
    assert json.loads(json.dumps(row(0))) == row(0)


def test_the_timeline_keeps_repeated_work(tmp_path: Path) -> None:
    """Wrong: a line cut short by a kill damages the timeline, or the time of a repeated window is
    lost."""
    path = tmp_path / "metrics.jsonl"
    timeline = tmp_path / "timeline.jsonl"
    rows = [{"role": "fm", "window": window, "phase": "learn"} for window in (0, 1)]
    Recorder(path).timeline(rows)
    timeline.write_bytes(timeline.read_bytes()[:-9])
    Recorder(path).timeline(rows)
    assert read_jsonl(timeline) == [rows[0], *rows]


def test_an_invalid_row_is_reported(tmp_path: Path) -> None:
    """Wrong: a damaged row of the timeline ends a finished run's command, or its report, in a
    traceback."""
    path = tmp_path / "timeline.jsonl"
    assert read_timeline(path) == []
    span = {
        "role": "das",
        "window": 1,
        "phase": "score",
        "started_s": 1.0,
        "ended_s": 2.0,
        "waited_s": 0.5,
        "examples": 3,
    }
    append_jsonl(path, [span, {}])
    with pytest.raises(UserError, match=r"timeline.jsonl: line 2 has no ended_s; remove the line"):
        read_timeline(path)
