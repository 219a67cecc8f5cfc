"""The examples run as they stand, from the repository's root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.heavy


def run(name: str, *arguments: object) -> str:
    """Run an example; what it prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, f"examples/{name}", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_source(tmp_path: Path) -> None:
    """Wrong: a source of a user's own needs an edit of the package."""
    lines = run("own_source.py", tmp_path).splitlines()
    assert len(lines) == 6
    assert lines[1] == "window 1: 720 events in 1 fragment(s)"


def test_own_model_and_what_reads_its_run(tmp_path: Path) -> None:
    """Wrong: a model of a user's own does not train, or a finished run cannot be read or served as
    the examples say."""
    folder = tmp_path / "own_model"
    lines = run("own_model.py", folder).splitlines()
    # Ray may warn on stdout about a small machine.
    figures_of = [line.partition(": NE ")[0] for line in lines if ": NE " in line]
    assert figures_of == ["feed labels", "feed ah"]
    figures = run("read_results.py", folder)
    assert "ah" in figures
    scores = run("serve_onnx.py", folder, "feed", "ah")
    assert scores
