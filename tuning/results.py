"""The results of a sweep: one Parquet file with a row for every finished trial.

The file is rewritten after each trial group.
"""

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
    """One student and arm, which are searched apart from all others."""

    student: str
    arm: str


@dataclass(frozen=True)
class Trial:
    """A finished trial.

    Attributes:
        number: from 0 on within its search.
        settings: settings of its last window; population-based training changes them.
        state: complete (all windows seen), stopped (early, because others were better) or failed.
        score: score after the last window of the curve; None for a failed trial.
        curve: figures after each validation window, over all validation windows so far.
        seconds: seconds of its process, divided evenly between the trials in it.
        error: why it failed.
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
        """Return the trial as a row of the file, without the settings that it does not have."""
        last = self.curve[-1] if self.curve else None
        columns = {
            "student": self.search.student,
            "arm": self.search.arm,
            "trial": self.number,
            "state": self.state,
            "score": self.score,
            "ne": last.ne if last else None,
            "calibration": last.calibration if last else None,
            "windows": [figures.window for figures in self.curve],
            "ne_curve": [figures.ne for figures in self.curve],
            "calibration_curve": [figures.calibration for figures in self.curve],
            "labels_curve": [figures.labels for figures in self.curve],
            "seconds": self.seconds,
            "error": self.error,
        }
        settings = {name: encoded(space[name], value) for name, value in self.settings.items()}
        return {**columns, **settings}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], space: Mapping[str, Distribution]) -> Self:
        """Return the trial that a row of the file holds."""
        curve = zip(
            row["windows"],
            row["ne_curve"],
            row["calibration_curve"],
            row["labels_curve"],
            strict=True,
        )
        settings = {
            name: decoded(distribution, row[name])
            for name, distribution in space.items()
            if row[name] is not None
        }
        return cls(
            search=Search(row["student"], row["arm"]),
            number=row["trial"],
            settings=settings,
            state=row["state"],
            score=row["score"],
            curve=tuple(Figures(*point) for point in curve),
            seconds=row["seconds"],
            error=row["error"],
        )


def write_trials(
    path: Path,
    trials: Iterable[Trial],
    space: Mapping[str, Distribution],
) -> None:
    """Write all trials atomically, sorted by search and number.

    Args:
        space: all settings that any arm searches; each is a column, null where a trial does not
            have it.
    """
    setting_fields = [(name, _column_type(distribution)) for name, distribution in space.items()]
    schema = pa.schema([*COLUMNS.items(), *setting_fields])
    ordered = sorted(trials, key=lambda trial: (trial.search, trial.number))
    table = pa.Table.from_pylist([trial.row(space) for trial in ordered], schema)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_trials(path: Path, space: Mapping[str, Distribution]) -> list[Trial]:
    """Read the trials of a file.

    Returns:
        The trials, or none where the file does not exist.

    Raises:
        UserError: the file is damaged, or holds trials of another space.
    """
    if not path.exists():
        return []
    try:
        table = pq.read_table(path, partitioning=None)
        names = [RENAMED.get(name, name) for name in table.column_names]
        rows: Sequence[dict[str, Any]] = table.rename_columns(names).to_pylist()
        return [Trial.from_row(row, space) for row in rows]
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: not the trials of this sweep ({error}); "
            "remove the file and the sweep starts over"
        ) from None


def _column_type(distribution: Distribution) -> pa.DataType:
    if distribution.choice:
        return pa.string()
    return pa.int64() if distribution.integer else pa.float64()
