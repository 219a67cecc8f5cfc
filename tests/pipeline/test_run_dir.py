"""The log of a run: warnings reach the user and the file."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from exfm_ray.pipeline.run_dir import run_log


def test_warnings_are_shown_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong: the user does not see that a damaged checkpoint was set aside, the log does not keep
    it, or a second run repeats each warning."""
    for _ in range(2):
        with run_log(tmp_path):
            logging.getLogger("exfm_ray.pipeline.runner").warning("checkpoint %s is damaged", "a")
        assert capsys.readouterr().err == "warning: checkpoint a is damaged\n"
    lines = (tmp_path / "logs" / "driver.log").read_text().splitlines()
    assert len(lines) == 2
    assert all(line.endswith("checkpoint a is damaged") for line in lines)
