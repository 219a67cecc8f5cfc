"""The only writer of a run's metrics, which also knows the run's progress.

<run>/metrics.jsonl    a line for each window, model, arm, domain and task
<run>/timeline.jsonl   a line for each pass of a role over a window: role, window,
                       phase (evaluate | learn | score), started_s and ended_s (seconds since the
                       epoch), waited_s (of these, seconds of waiting for data or a snapshot),
                       examples
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
    """Appends rows to metrics.jsonl, each once.

    A job that is restarted after a kill may send the rows of a window a second time.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._known = {_identity(row) for row in read_metrics(path)}
        self._timeline = path.with_name(TIMELINE)
        for file in (path, self._timeline):
            truncate_partial_line(file)
        self._progress: dict[str, tuple[int, int]] = {}

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append the new ones of these rows, in one write."""
        new = [row for row in rows if _identity(row) not in self._known]
        if not new:
            return
        append_jsonl(self._path, new)
        self._known.update(_identity(row) for row in new)

    def timeline(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append what a job did when. A window that is repeated after a kill has both rows."""
        append_jsonl(self._timeline, rows)

    def progress(
        self,
        job: str,
        window: int,
        examples: int,
    ) -> None:
        """Record that a job, which is at `window`, has learned or scored `examples` more."""
        _, done = self._progress.get(job, (0, 0))
        self._progress[job] = (window, done + examples)

    def state(self) -> dict[str, tuple[int, int]]:
        """Job -> (current window, examples done by this process)."""
        return dict(self._progress)


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a row; only rows of a static set have a pass."""
    return row.get("pass"), *(row[key] for key in IDENTITY)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl.

    Raises:
        UserError: a row has not all of the fields.
    """
    return _read_rows(path, FIELDS)


def read_timeline(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a timeline.jsonl.

    Raises:
        UserError: a row has not all of the fields.
    """
    return _read_rows(path, SPAN)


def _read_rows(path: Path, fields: set[str]) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        missing = sorted(fields - row.keys())
        if missing:
            raise UserError(f"{path}: line {number} has no {missing[0]}; remove the line")
    return rows


RecorderActor = ray.remote(num_cpus=0)(Recorder)
