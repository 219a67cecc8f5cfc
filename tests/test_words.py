"""Words that this project once used in a sense of its own stay out of code, messages and docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("exfm_ray", "tuning", "cluster", "benchmarks", "studies", "examples", "docs", "configs")
PRIVATE = (
    "anew",
    "gifts?",
    "held (?:back|up)",
    "lacking",
    "lacks?",
    "lasting",
    "learnt",
    "lest",
    "parked",
    "stood in",
    "tells?",
    "told",
    "whoever",
    "embedded stream",
    "goes on where it stopped",
)
BRITISH = (
    "colour",
    "initialis",
    "labelled",
    "normalis",
    "quantis",
    "serialis",
    "summaris",
    "utilis",
)
WORDS = re.compile(
    rf"(?<![\w.])(?:(?:{'|'.join(PRIVATE)})(?![\w.])|(?:{'|'.join(BRITISH)})\w*)",
    re.IGNORECASE,
)
ON_DISK = re.compile(r"[\"'`](?:parked|stood_in|parked\.json|normaliser)[\"'`]|learnt: ")
"""Names in files on disk, which keep them."""

FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md", ".yaml") and not path.is_relative_to(ROOT / "exfm_ray/configs")
)
FILES += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "run.py", "Makefile")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_words(path: Path) -> None:
    """Wrong: a stranger needs this project's own dictionary to read it."""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        match = WORDS.search(ON_DISK.sub("", line))
        assert not match, f"{path.relative_to(ROOT)}:{number}: '{match[0]}' in: {line.strip()}"
