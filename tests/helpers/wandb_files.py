"""Offline runs of wandb, read back with wandb's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Record = dict[str, Any]
KEY = "0123456789abcdef" * 2 + "secret42"


def surroundings(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Set an API key in the environment, and keep wandb out of the home folder."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(folder / "home"))


def run_files(folder: Path) -> dict[str, Path]:
    """Return id -> file of all offline runs in <folder>/wandb; assert that ids are unique."""
    paths = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    by_id = {path.stem.removeprefix("run-"): path for path in paths}
    assert len(by_id) == len(paths), "a run was written twice"
    return by_id


class OfflineRun:
    """An offline run, without wandb's own keys.

    Attributes:
        start: the record that begins the run.
        config: its settings.
        metrics: name -> step axis.
        history: its points.
        summary: its summary values.
        exit: the records that end the run.
        artifacts: with `references`, file -> its location.
    """

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", str(path), "--json"]
        lines = subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.splitlines()
        self.records: list[Record] = [json.loads(line) for line in lines]
        (self.start,) = self._of("run")
        self.config = _plain(self.start["config"]["update"])
        self.metrics = {
            metric.get("name") or metric["glob_name"]: metric.get("step_metric")
            for metric in self._of("metric")
        }
        self.history = [_plain(record["item"]) for record in self._of("history")]
        self.summary: Record = {}
        for record in self._of("summary"):
            self.summary |= _plain(record.get("update", {}))
        self.exit = self._of("exit")
        self.artifacts = [_artifact(record) for record in self._of("artifact")]

    def _of(self, kind: str) -> list[Record]:
        return [record[kind] for record in self.records if record["type"] == kind]


def _plain(items: Record) -> Record:
    return {key: value for key, value in items.items() if not key.startswith("_")}


def _artifact(record: Record) -> Record:
    references = {entry["path"]: entry["ref"] for entry in record["manifest"]["contents"]}
    return {
        "type": record["type"],
        "name": record["name"],
        "metadata": json.loads(record["metadata"]),
        "references": references,
    }


def content(folder: Path) -> bytes:
    """Return the bytes of all files below a folder, concatenated."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
