"""Missing supervision of a run: on the terminal and in the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from markupsafe import escape
from run_folders import write_run

from exfm_ray.cli.train import show
from exfm_ray.storage.atomic import write_json
from exfm_ray.tracking.missing_supervision import missing_supervision
from exfm_ray.tracking.report import write_report

SUMMARY = {"windows": [], "figures": [], "roles": {}, "peak_memory_bytes": 2**30}
FAILED_FRAGMENT = {
    "teacher": "fm",
    "window": 2,
    "fragment": "fragment=0001.parquet",
    "snapshot": 2,
    "cause": "<a> is damaged [x]",
    "tries": 3,
}
FAILED_WINDOW = {
    **FAILED_FRAGMENT,
    "window": 4,
    "fragment": None,
    "cause": "no room",
    "tries": 1,
}
FALLBACK = {"teacher": "big", "window": 3, "asked": 3, "snapshot": 1}
LINES = [
    "window 2, fragment=0001.parquet: no supervision by 'fm', failed: <a> is damaged [x]",
    "window 4: no supervision by 'fm', failed: no room",
    "window 3: supervised by fallback snapshot 1 of 'big' instead of snapshot 3",
]


def test_missing_supervision_is_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Wrong: only a running service reports a failed window or one that a fallback snapshot has
    scored, or its cause breaks the page."""
    config, _ = write_run(tmp_path, "a")
    path = config.folder / "summary.json"
    write_json(path, SUMMARY)
    show(config)
    assert "supervision by" not in capsys.readouterr().out
    assert 'class="missing"' not in write_report(config.folder).read_text()

    failed = {"failed_items": [FAILED_FRAGMENT, FAILED_WINDOW], "fallback_windows": [FALLBACK]}
    write_json(path, SUMMARY | failed)
    show(config)
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("window")] == LINES
    page = write_report(config.folder).read_text()
    for line in LINES:
        assert f'<p class="missing">{escape(line)}</p>' in page


def test_summaries_of_former_versions_are_read() -> None:
    """Wrong: a run of a former version looks fully supervised."""
    former = {"parked": [FAILED_FRAGMENT, FAILED_WINDOW], "stood_in": [FALLBACK]}
    assert missing_supervision(former) == LINES
    assert missing_supervision({}) == []
