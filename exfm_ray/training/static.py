"""Static sets: several passes over the training windows, stopped early by a validation window.

For benchmarks on sets without time. The windows before `validation_window` are learned. That window
decides when to stop and which pass is the best. The windows after it (tests) are only evaluated.
Rule 1 holds: no held-out window is ever learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from exfm_ray.config.trainer import StaticConfig
from exfm_ray.data.readers import WindowPass
from exfm_ray.schema import ALL_DOMAINS


@dataclass(frozen=True)
class StaticSet:
    """The windows of a static set."""

    config: StaticConfig
    windows: tuple[int, ...]

    @property
    def training(self) -> tuple[int, ...]:
        """Windows that are learned in each pass."""
        return tuple(window for window in self.windows if window < self.config.validation_window)

    @property
    def held_out(self) -> tuple[int, ...]:
        """The validation window and the tests."""
        return tuple(window for window in self.windows if window >= self.config.validation_window)

    def passes(self, number: int) -> list[WindowPass]:
        """What pass `number`, counted from 1, reads.

        First the training windows to learn, then the others to evaluate.
        """
        return [
            *(WindowPass(window, "learn", number) for window in self.training),
            *(WindowPass(window, "evaluate", number) for window in self.held_out),
        ]


@dataclass
class EarlyStopping:
    """Which pass was the best so far, and whether to stop.

    Attributes:
        best: number of the best pass; 0 before the first.
        value: its figure on the validation window, the mean over the tasks; None if undefined, as
            with labels of one class.
        last: number of the last pass.
    """

    config: StaticConfig
    best: int = 0
    value: float | None = None
    last: int = 0

    @classmethod
    def restore(cls, config: StaticConfig, state: Mapping[str, Any]) -> Self:
        """Restore what `state()` returned."""
        return cls(config, **state)

    def state(self) -> dict[str, Any]:
        """The state as a checkpoint stores it."""
        return {"best": self.best, "value": self.value, "last": self.last}

    @property
    def over(self) -> bool:
        """True if all passes are done, or the last `patience` of them improved nothing."""
        return self.last >= self.config.passes or self.last - self.best >= self.config.patience

    def take(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Take in the metric rows of a pass; True if it is the best so far."""
        self.last += 1
        values = [
            row[self.config.monitor]
            for row in rows
            if row["window"] == self.config.validation_window and row["domain"] == ALL_DOMAINS
        ]
        value = float(np.mean(values)) if values and None not in values else None
        if self.best and not self._is_better(value):
            return False
        self.best = self.last
        self.value = value
        return True

    def _is_better(self, value: float | None) -> bool:
        """Compare with the best figure so far; any figure is better than an undefined one."""
        if value is None or self.value is None:
            return value is not None
        return value > self.value if self.config.monitor == "auc" else value < self.value
