"""The one writer of a run's metrics, and the place where its progress is known.

<run>/metrics.jsonl    a line for each window, model, arm, domain and task
<run>/timeline.jsonl   a line for each pass of a role over a window: role, window, phase (evaluate |
learn | score), started_s and
                       ended_s (seconds since the epoch), waited_s (of these, for data or a
                       snapshot), examples
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import append_jsonl, read_jsonl, truncate_partial_line

IDENTITY = ("window", "role", "model", "arm", "domain", "task", "seed")
FIELDS = {*IDENTITY, "ne", "auc", "gauc", "log_loss", "calibration", "label_rate", "examples"}
SPAN = {"role", "window", "phase", "started_s", "ended_s", "waited_s", "examples"}
TIMELINE = "timeline.jsonl"


class Recorder:
    """Appends rows to metrics.jsonl, each once: a job that goes on after a kill may send a window's
    rows again."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._known = {self._identity(row) for row in read_metrics(path)}
        self._timeline = path.with_name(TIMELINE)
        for file in (path, self._timeline):
            truncate_partial_line(file)
        self._progress: dict[str, tuple[int, int]] = {}

    @staticmethod
    def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
        return (
            row.get("pass"),
            *(row[key] for key in IDENTITY),
        )  # `pass` stands only in the rows of a static set

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append the rows that are not there yet, in one write."""
        new = [row for row in rows if self._identity(row) not in self._known]
        if not new:
            return
        append_jsonl(self._path, new)
        self._known.update(self._identity(row) for row in new)

    def timeline(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append what a job did when. A window that is done again after a kill has rows of both
        times."""
        append_jsonl(self._timeline, rows)

    def progress(
        self,
        job: str,
        window: int,
        examples: int,
    ) -> None:
        """`examples` more were learnt (or scored) by `job`, which is at `window`."""
        self._progress[job] = (window, self._progress.get(job, (0, 0))[1] + examples)

    def state(self) -> dict[str, tuple[int, int]]:
        """Job -> (window it is at, examples done by this process)."""
        return dict(self._progress)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; UserError where one of them is none."""
    return _rows(path, FIELDS)


def read_timeline(path: Path) -> list[dict[str, Any]]:
    """Rows of a timeline.jsonl; UserError where one of them is none."""
    return _rows(path, SPAN)


def _rows(path: Path, fields: set[str]) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if not row.keys() >= fields:
            raise UserError(
                f"{path}: line {number} has no {sorted(fields - row.keys())[0]}; remove the line"
            )
    return rows


RecorderActor = ray.remote(num_cpus=0)(Recorder)
