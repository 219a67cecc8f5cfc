"""`run.py das start|status|stop`: what they print and how they end."""

from __future__ import annotations

import io
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.exceptions import RayActorError
from rich.console import Console
from small_runs import SETTINGS, merged

from exfm_ray.cli.das_status import seconds, status_tables
from exfm_ray.cli.main import main
from exfm_ray.das.client import services


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "served.yaml"
    path.write_text(yaml.safe_dump(merged(SETTINGS, {"run": {"dir": str(tmp_path / "runs")}})))
    return path


def ran(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Run a command. Returns the exit code and everything that it printed, as one line."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    out, errors = capsys.readouterr()
    return code, " ".join((out + errors).split())


def waiting(capsys: pytest.CaptureFixture[str], *named: object) -> str:
    """Return the status once the service has read its stream."""
    deadline = time.monotonic() + 60
    shown = ""
    while "window 1 waits for snapshot 1" not in shown:
        assert time.monotonic() < deadline, shown
        with suppress(RayActorError):  # it is being restarted
            shown = ran(capsys, "das", "status", *named)[1]
        time.sleep(0.1)
    return shown


def restarted(capsys: pytest.CaptureFixture[str], *named: object) -> str:
    """Kill the service's process and return the status of the restarted one."""
    (service,) = (service for name, service in services().items() if "served" in name)
    ray.kill(service, no_restart=False)
    return waiting(capsys, *named)


def test_start_status_stop(
    cluster: None,
    capsys: pytest.CaptureFixture[str],
    file: Path,
) -> None:
    """Wrong: a service starts without a stream or does not start, no longer follows after Ray has
    restarted it, does not show its state, or cannot be ended."""
    named = ("--config", file)
    code, out = ran(capsys, "das", "status", *named)
    assert code == 2 and "no DAS of run 'served' is running in this Ray" in out
    code, out = ran(capsys, "das", "start", *named)
    assert code == 2 and "no prepared stream here" in out
    assert main(["prepare", "--config", str(file)]) == 0
    code, out = ran(capsys, "das", "start", *named)
    assert code == 0 and "labels the 4 windows" in out and "and those that appear later" not in out
    code, out = ran(capsys, "das", "start", "--follow", *named)
    assert code == 0 and "and those that appear later" in out, "started twice"
    for shown in (waiting(capsys, *named), restarted(capsys, *named)):
        assert "follows the stream" in shown and "3 windows, 12 fragments, 2,700 examples" in shown
    code, out = ran(capsys, "das", "stop", *named)
    assert code == 0 and out.endswith("ended")
    assert ran(capsys, "das", "stop", *named)[0] == 2


def test_mistakes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a mistake ends in a traceback, or takes minutes because no Ray is running."""
    if not ray.is_initialized():
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
        code, out = ran(capsys, "das", "status")
        assert code == 2 and "no running Ray to connect to ([Errno 111] Connection refused)" in out
    for words, message in (
        (("strat",), "invalid choice: 'strat'"),
        (("start",), "the following arguments are required: --config"),
        (("status", "--name", "x"), "--set and --name require --config"),
        (("--config", "demo", "stop"), "--config, --set and --name go after start|status|stop"),
        ((), "the following arguments are required: --config; see run.py das --help"),
    ):
        code, out = ran(capsys, "das", *words)
        assert code == 2 and message in out


STATE: dict[str, Any] = {
    "teacher": "fm",
    "store": "/runs/a/supervision",
    "clients": 2,
    "detached": True,
    "follow": False,
    "examples_per_s": 1234.5,
    "error": "",
    "backlog": {"windows": 2, "fragments": 7, "examples": 70_000},
    "committed": 3,
    "throttled": "window 4 waits for snapshot 4",
    "actors": [
        {"number": 3, "process": 77, "up": True, "snapshots": [2], "loading": [3], "fragments": 2}
    ],
    "written": [
        {
            "window": 3,
            "snapshot": 2,
            "examples": 9000,
            "label_s": 1000.0,
            "snapshot_s": 5000.0,
            "ended_s": 5012.3,
        }
    ],
    "failed": [{"window": 1, "fragment": None, "snapshot": 0, "cause": "no snapshot", "tries": 1}],
}


def test_status_shows_the_state_of_the_service() -> None:
    """Wrong: a number is missing from the tables, or belongs to another row or age."""
    console = Console(width=200, record=True, file=io.StringIO())
    for table in status_tables(STATE | {"faults": [(time.time() - 90, "an actor died")]}):
        console.print(table)
    shown = " ".join(console.export_text().split())
    for part in (
        "2 windows, 7 fragments, 70,000 examples",
        "1,234 examples/s",
        "waits for snapshot 4",
        "2, 3 (loading)",
        "scoring",
        "2 client(s)",
        "│ 3 │ 2 │ 2 │ 9,000 │ 12.3 s │ 1:06:52 │",
        "│ 1 │ all │ │ 1 │ no snapshot │",
        "│ 0:01:30 │ an actor died │",
    ):
        assert part in shown, (part, shown)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (3600.0, "1:00:00"), (90_000.0, "1 day, 1:00:00")],
)
def test_ages(value: float, expected: str) -> None:
    """Wrong: an age in days reads as seconds."""
    assert seconds(value) == expected
