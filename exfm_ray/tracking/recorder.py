"""The one writer of a run's metrics, and the place where its progress is known."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

IDENTITY = ("window", "role", "model", "arm", "domain", "task", "seed")


class Recorder:
    """Appends rows to metrics.jsonl, each once: a job that goes on after a kill may send a window's rows again."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._known = {self._identity(row) for row in read_metrics(path)}
        if path.exists():  # cut off what a kill cut short, or the next row would be glued to it
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._progress: dict[str, tuple[int, int]] = {}

    @staticmethod
    def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
        return (row.get("pass"), *(row[key] for key in IDENTITY))  # `pass` stands only in the rows of a static set

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append the rows that are not there yet, in one write."""
        new = [row for row in rows if self._identity(row) not in self._known]
        if not new:
            return
        with self._path.open("a") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in new))
            file.flush()
            os.fsync(file.fileno())
        self._known.update(self._identity(row) for row in new)

    def progress(self, job: str, window: int, examples: int) -> None:
        """`examples` more were learnt (or scored) by `job`, which is at `window`."""
        self._progress[job] = (window, self._progress.get(job, (0, 0))[1] + examples)

    def state(self) -> dict[str, tuple[int, int]]:
        """Job -> (window it is at, examples done by this process)."""
        return dict(self._progress)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that is not whole (being written, or cut short by a kill) is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


RecorderActor = ray.remote(num_cpus=0)(Recorder)
