"""Commands that are refused with one line on stderr."""

from __future__ import annotations

from pathlib import Path

import pytest

from exfm_ray.cli.main import main


def refused(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    *arguments: object,
) -> str:
    """Run a command that must be refused, and return its line on stderr.

    Asserts exit code 2, one line on stderr, and no change on disk.
    """
    before = content(folder)
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, errors = capsys.readouterr()
    assert out == "" and errors.startswith("error: ") and errors.count("\n") == 1, (out, errors)
    assert content(folder) == before
    return errors


def content(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
