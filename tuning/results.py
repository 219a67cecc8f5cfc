"""The results of a sweep: one Parquet file with a row for every finished trial, written anew after
each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from exfm_ray.config.tune import RENAMED, Distribution, Settings
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import atomic_path
from tuning.space import decoded, encoded
from tuning.trial import Figures

State = Literal["complete", "stopped", "failed"]
COLUMNS = {
    "student": pa.string(),
    "arm": pa.string(),
    "trial": pa.int32(),
    "state": pa.string(),
    "score": pa.float64(),
    "ne": pa.float64(),
    "calibration": pa.float64(),
    "windows": pa.list_(pa.int32()),
    "ne_curve": pa.list_(pa.float64()),
    "calibration_curve": pa.list_(pa.float64()),
    "labels_curve": pa.list_(pa.float64()),
    "seconds": pa.float64(),
    "error": pa.string(),
}


class Search(NamedTuple):
    """What is searched apart from all else."""

    student: str
    arm: str


@dataclass(frozen=True)
class Trial:
    """A finished trial.

    Attributes:
        state: all windows seen; stopped early, for others were better; failed with `error`.
        score: after the last window of the curve; None for a failed trial.
        settings: those of its last window; population-based training changes them on the way.
        curve: figures over the score windows up to each.
        seconds: its share of the seconds of the process in which it learnt together with others.
    """

    search: Search
    number: int
    settings: Settings
    state: State
    score: float | None
    curve: tuple[Figures, ...]
    seconds: float
    error: str | None = None

    def row(self, space: Mapping[str, Distribution]) -> dict[str, Any]:
        """The trial as a row of the file; settings that it was not asked for are null."""
        last = self.curve[-1] if self.curve else None
        return {
            "student": self.search.student,
            "arm": self.search.arm,
            "trial": self.number,
            "state": self.state,
            "score": self.score,
            "ne": last and last.ne,
            "calibration": last and last.calibration,
            "windows": [f.window for f in self.curve],
            "ne_curve": [f.ne for f in self.curve],
            "calibration_curve": [f.calibration for f in self.curve],
            "labels_curve": [f.labels for f in self.curve],
            "seconds": self.seconds,
            "error": self.error,
            **{name: encoded(space[name], value) for name, value in self.settings.items()},
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any], space: Mapping[str, Distribution]) -> Self:
        """The trial that a row holds."""
        curve = zip(
            row["windows"],
            row["ne_curve"],
            row["calibration_curve"],
            row["labels_curve"],
            strict=True,
        )
        return cls(
            search=Search(row["student"], row["arm"]),
            number=row["trial"],
            state=row["state"],
            score=row["score"],
            curve=tuple(Figures(*point) for point in curve),
            seconds=row["seconds"],
            error=row["error"],
            settings={
                name: decoded(d, row[name]) for name, d in space.items() if row[name] is not None
            },
        )


def write_trials(
    path: Path,
    trials: Iterable[Trial],
    space: Mapping[str, Distribution],
) -> None:
    """Write all trials, in one order, atomically. `space`: all settings that any arm searches; each
    is a column."""
    fields = [
        *COLUMNS.items(),
        *((name, _kind(distribution)) for name, distribution in space.items()),
    ]
    rows = [
        trial.row(space) for trial in sorted(trials, key=lambda trial: (trial.search, trial.number))
    ]
    table = pa.Table.from_pylist(rows, pa.schema(fields))
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_trials(path: Path, space: Mapping[str, Distribution]) -> list[Trial]:
    """The trials in a file, none where there is no file; UserError where it is no file of this
    space."""
    if not path.exists():
        return []
    try:
        table = pq.read_table(path, partitioning=None)
        table = table.rename_columns([RENAMED.get(name, name) for name in table.column_names])
        rows: Sequence[dict[str, Any]] = table.to_pylist()
        return [Trial.from_row(row, space) for row in rows]
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: not the trials of this sweep ({error}); remove the file, and the sweep begins anew"
        ) from None


def _kind(distribution: Distribution) -> pa.DataType:
    return (
        pa.string() if distribution.choice else pa.int64() if distribution.integer else pa.float64()
    )
