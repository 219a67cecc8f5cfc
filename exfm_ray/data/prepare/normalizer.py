"""Dense features normalised by what earlier windows have shown, never by the window itself or a
later one."""

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
        """Take in rows; NaN stands for a missing value and does not count."""
        other = Moments(values_ND.shape[1])
        present = ~np.isnan(values_ND)
        filled = np.where(present, values_ND, 0.0)
        other.count = present.sum(axis=0).astype(np.float64)
        other.mean = filled.sum(axis=0) / np.maximum(other.count, 1)
        other.m2 = (np.where(present, values_ND - other.mean, 0.0) ** 2).sum(axis=0)
        self.merge(other)

    def merge(self, other: Moments) -> None:
        """Take in another set of moments."""
        total = self.count + other.count
        share = other.count / np.maximum(total, 1)
        gap = other.mean - self.mean
        self.mean = self.mean + gap * share
        self.m2 = self.m2 + other.m2 + gap**2 * self.count * share
        self.count = total


class Normalizer:
    """`apply` uses the windows closed so far; `observe` collects the open one; `close_window` moves
    it over."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._closed = Moments(len(names))
        self._open = Moments(len(names))

    def apply(self, values_ND: Array) -> Array:
        """float32 (N, D): shifted and scaled, missing as 0, within [-10, 10]. Unchanged scale
        before the first close."""
        shift, scale = self._scale()
        normal = (values_ND - shift) / scale
        return np.clip(np.nan_to_num(normal, nan=0.0), -LIMIT, LIMIT).astype(np.float32)

    def _scale(self) -> tuple[Array, Array]:
        std = np.sqrt(self._closed.m2 / np.maximum(self._closed.count, 1))
        usable = (self._closed.count > 1) & (std > SMALLEST_STD)
        return np.where(self._closed.count > 1, self._closed.mean, 0.0), np.where(usable, std, 1.0)

    def observe(self, values_ND: Array) -> None:
        """Collect transformed, unnormalised rows of the open window."""
        if values_ND.shape[1]:
            self._open.add(values_ND)

    def close_window(self) -> None:
        """From now on the open window counts as an earlier one."""
        self._closed.merge(self._open)
        self._open = Moments(len(self.names))

    def dump(self) -> dict[str, list[float]]:
        """All that `restore` needs, as JSON without loss; to be called between windows."""
        return {name: values.tolist() for name, values in vars(self._closed).items()}

    def restore(self, dumped: Mapping[str, Sequence[float]]) -> None:
        """Go on where `dump` was called."""
        for name, values in dumped.items():
            setattr(self._closed, name, np.array(values))

    def state(self) -> dict[str, dict[str, float]]:
        """Count, mean and std of every dense feature over the closed windows, for the manifest and
        for serving."""
        shift, scale = self._scale()
        rows = zip(self.names, self._closed.count, shift, scale, strict=True)
        return {
            name: {"count": float(count), "mean": float(mean), "std": float(std)}
            for name, count, mean, std in rows
        }
