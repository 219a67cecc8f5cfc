"""Dense features, normalized with the statistics of earlier windows, never with those of the window
itself or a later one.

Shapes: N rows, D dense features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LIMIT = 10.0
SMALLEST_STD = 1e-6


class Moments:
    """Count, mean and sum of squared deviations (M2) per column, merged chunk by chunk (Chan et al.
    1979)."""

    def __init__(self, width: int) -> None:
        self.count = np.zeros(width)
        self.mean = np.zeros(width)
        self.m2 = np.zeros(width)

    def add(self, values_ND: Array) -> None:
        """Add rows; NaN is a missing value and does not count."""
        width = values_ND.shape[1]
        present_ND = ~np.isnan(values_ND)
        filled_ND = np.where(present_ND, values_ND, 0.0)
        chunk = Moments(width)
        chunk.count = present_ND.sum(axis=0).astype(np.float64)
        chunk.mean = filled_ND.sum(axis=0) / np.maximum(chunk.count, 1)
        deviation_ND = np.where(present_ND, values_ND - chunk.mean, 0.0)
        chunk.m2 = (deviation_ND**2).sum(axis=0)
        self.merge(chunk)

    def merge(self, other: Moments) -> None:
        """Add the rows of other moments."""
        total = self.count + other.count
        fraction = other.count / np.maximum(total, 1)
        gap = other.mean - self.mean
        between = gap**2 * self.count * fraction
        self.mean = self.mean + gap * fraction
        self.m2 = self.m2 + other.m2 + between
        self.count = total


class Normalizer:
    """Normalizes dense features.

    `apply` uses the closed windows, `observe` collects the open one, and `close_window` adds the
    open window to the closed ones.
    """

    def __init__(self, names: Sequence[str]) -> None:
        width = len(names)
        self.names = list(names)
        self._closed = Moments(width)
        self._open = Moments(width)

    def apply(self, values_ND: Array) -> Array:
        """Shift and scale values: float32 (N, D) within [-10, 10], missing values as 0.

        Before the first `close_window` the scale is unchanged.
        """
        mean_D, std_D = self._mean_and_std()
        normal_ND = (values_ND - mean_D) / std_D
        filled_ND = np.nan_to_num(normal_ND, nan=0.0)
        clipped_ND = np.clip(filled_ND, -LIMIT, LIMIT)
        return clipped_ND.astype(np.float32)

    def _mean_and_std(self) -> tuple[Array, Array]:
        """Mean and standard deviation over the closed windows: two float64 (D,).

        A column with too few values has mean 0 and std 1; one that is constant has std 1.
        """
        closed = self._closed
        variance_D = closed.m2 / np.maximum(closed.count, 1)
        std_D = np.sqrt(variance_D)
        enough_D = closed.count > 1
        varies_D = std_D > SMALLEST_STD
        mean_D = np.where(enough_D, closed.mean, 0.0)
        return mean_D, np.where(enough_D & varies_D, std_D, 1.0)

    def observe(self, values_ND: Array) -> None:
        """Collect transformed rows of the open window, not yet normalized."""
        width = values_ND.shape[1]
        if width:
            self._open.add(values_ND)

    def close_window(self) -> None:
        """Count the open window as an earlier one from now on."""
        width = len(self.names)
        self._closed.merge(self._open)
        self._open = Moments(width)

    def dump(self) -> dict[str, list[float]]:
        """Everything that `restore` needs, as JSON without loss. Call this between windows."""
        moments = vars(self._closed)
        dumped = {}
        for name, values_D in moments.items():
            dumped[name] = values_D.tolist()
        return dumped

    def restore(self, dumped: Mapping[str, Sequence[float]]) -> None:
        """Resume from the state that `dump` returned."""
        for name, values in dumped.items():
            values_D = np.array(values)
            setattr(self._closed, name, values_D)

    def state(self) -> dict[str, dict[str, float]]:
        """Count, mean and std of each dense feature over the closed windows, for the manifest and
        for serving."""
        mean_D, std_D = self._mean_and_std()
        count_D = self._closed.count
        state = {}
        for i, name in enumerate(self.names):
            state[name] = {
                "count": float(count_D[i]),
                "mean": float(mean_D[i]),
                "std": float(std_D[i]),
            }
        return state
