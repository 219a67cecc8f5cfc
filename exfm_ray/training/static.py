"""Static sets: several passes over the training windows, stopped early by a validation window.

For benchmarks of sets without time. The windows before `validation_window` are learnt, that window
decides when to stop and which pass is the best, the windows after it (tests) are only evaluated.
Rule 1 holds: no held-out window is ever learnt.
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
    def learnt(self) -> tuple[int, ...]:
        """Windows that are learnt in each pass."""
        return tuple(window for window in self.windows if window < self.config.validation_window)

    @property
    def held_out(self) -> tuple[int, ...]:
        """The validation window and the tests."""
        return tuple(window for window in self.windows if window >= self.config.validation_window)

    def passes(self, number: int) -> list[WindowPass]:
        """What pass `number`, counted from 1, reads: the training windows to learn, then the others
        to evaluate."""
        return [
            *(WindowPass(window, "learn", number) for window in self.learnt),
            *(WindowPass(window, "evaluate", number) for window in self.held_out),
        ]


@dataclass
class EarlyStopping:
    """Which pass was the best so far, and whether it is time to stop.

    Attributes:
        best: number of the best pass; 0 before the first.
        value: its figure on the validation window, the mean over the tasks; None where it is
            undefined, as with labels of one class.
        last: number of the last pass.
    """

    config: StaticConfig
    best: int = 0
    value: float | None = None
    last: int = 0

    @classmethod
    def restore(cls, config: StaticConfig, state: Mapping[str, Any]) -> Self:
        """From `state()`."""
        return cls(config, **state)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": self.best, "value": self.value, "last": self.last}

    @property
    def over(self) -> bool:
        """True when all passes are done, or `patience` of them brought nothing."""
        return self.last >= self.config.passes or self.last - self.best >= self.config.patience

    def take(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Take in the metric rows of a pass; True where it is the best so far."""
        self.last += 1
        values = [
            r[self.config.monitor]
            for r in rows
            if r["window"] == self.config.validation_window and r["domain"] == ALL_DOMAINS
        ]
        value = float(np.mean(values)) if values and None not in values else None
        if not self.best or self._better(value):
            self.best = self.last
            self.value = value
            return True
        return False

    def _better(self, value: float | None) -> bool:
        """Any figure is better than none."""
        if value is None or self.value is None:
            return value is not None
        return value > self.value if self.config.monitor == "auc" else value < self.value
