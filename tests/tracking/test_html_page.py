"""What a run's supervision lacks: on the terminal and in the report."""

from __future__ import annotations

from html import escape
from pathlib import Path

import pytest
from run_folders import write_run

from exfm_ray.cli.train import show
from exfm_ray.storage.atomic import write_json
from exfm_ray.tracking.report import write_report

PARKED = {
    "teacher": "fm",
    "window": 2,
    "fragment": "fragment=0001.parquet",
    "snapshot": 2,
    "cause": "<a> is damaged [x]",
    "tries": 3,
}
STOOD_IN = {"teacher": "big", "window": 3, "asked": 3, "snapshot": 1}
LINES = (
    "window 2, fragment=0001.parquet: no supervision by 'fm', parked: <a> is damaged [x]",
    "window 4: no supervision by 'fm', parked: no room",
    "window 3: supervised by snapshot 1 of 'big', snapshot 3 is left out",
)


def test_what_is_not_supervised_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Wrong: a parked window, or one that a stand-in has scored, is told by a running service only,
    or its cause spoils the page."""
    config, _ = write_run(tmp_path, "a")
    whole = {**PARKED, "window": 4, "fragment": None, "cause": "no room", "tries": 1}
    summary = {"windows": [], "figures": [], "roles": {}, "peak_memory_bytes": 2**30}
    write_json(config.folder / "summary.json", summary)
    show(config)
    assert (
        "supervision by" not in capsys.readouterr().out
        and "class=lacks" not in write_report(config.folder).read_text()
    )
    write_json(
        config.folder / "summary.json",
        summary | {"parked": [PARKED, whole], "fallback_windows": [STOOD_IN]},
    )
    show(config)
    out = capsys.readouterr().out
    page = write_report(config.folder).read_text()
    assert [line for line in out.splitlines() if line.startswith("window")] == list(LINES)
    assert [f"<p class=lacks>{escape(line)}</p>" in page for line in LINES] == [True] * 3
