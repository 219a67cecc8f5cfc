"""docs/quickstart.md is what it says: its files, written and run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from exfm_ray.tracking.run_files import RunFiles

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", re.DOTALL)


@pytest.mark.heavy
def test_quickstart(tmp_path: Path) -> None:
    """Wrong: a newcomer who follows the page gets an error, or no figures of a student."""
    for name, text in BLOCK.findall((ROOT / "docs" / "quickstart.md").read_text()):
        (tmp_path / name).write_text(text)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    for command in (
        ["make_events.py"],
        [str(ROOT / "run.py"), "pipeline", "--config", "own.yaml", "--set", "wandb.mode=disabled"],
        [str(ROOT / "run.py"), "export", "runs/own", "--vm", "feed", "--arm", "ah"],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    rows = RunFiles.open(tmp_path / "runs" / "own").rows
    assert {("feed", "ah"), ("search", "labels")} <= {(row["model"], row["arm"]) for row in rows}
    assert (tmp_path / "runs/own/report.html").stat().st_size > 0
