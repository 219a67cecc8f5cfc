"""Repeated events: equal content at an equal event time, found without keeping the stream in
memory.

Shapes: N events.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from exfm_ray.data.prepare.encode import splitmix64

Array = np.ndarray[Any, Any]


def fold(hash_N: Array, column_N: Array) -> Array:
    """Fold one more column of 8-byte values into the row hashes: uint64 (N,)."""
    contiguous_N = np.ascontiguousarray(column_N)
    bits_N = contiguous_N.view(np.uint64)
    return splitmix64(hash_N ^ bits_N)


def fold_bag(hash_N: Array, bag: pa.Array) -> Array:
    """Fold a list<int32> column into the row hashes. The order within a list matters."""
    offsets = bag.offsets.to_numpy().astype(np.int64)
    lengths_N = np.diff(offsets)
    bounds = offsets - offsets[0]
    begin_N = bounds[:-1]
    end_N = bounds[1:]

    values = bag.flatten().to_numpy().astype(np.uint64)
    place = np.arange(len(values)) - np.repeat(begin_N, lengths_N)
    shifted = place.astype(np.uint64) << np.uint64(32)
    value_hashes = splitmix64(values ^ shifted)

    total = np.cumsum(value_hashes, dtype=np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), total])
    bag_N = sums[end_N] - sums[begin_N]
    return fold(hash_N, bag_N ^ lengths_N.astype(np.uint64))


class DuplicateFinder:
    """Finds rows whose (time, hash) came before. Holds only the hashes of the latest time."""

    def __init__(self) -> None:
        self._time: int | None = None
        self._seen = np.empty(0, np.uint64)

    def repeated(self, time_N: Array, hash_N: Array) -> Array:
        """Which rows are repetitions: bool (N,).

        Args:
            time_N: int64, not decreasing, also from call to call.
            hash_N: uint64, hashes of the rows.
        """
        rows = len(time_N)
        repeated_N = np.zeros(rows, bool)
        if not rows:
            return repeated_N
        sorted_N = np.lexsort((hash_N, time_N))
        same_time = np.diff(time_N[sorted_N]) == 0
        same_hash = np.diff(hash_N[sorted_N]) == 0
        # lexsort is stable: the first of equal rows is no repetition.
        repeated_N[sorted_N[1:]] = same_time & same_hash

        if time_N[0] == self._time:
            end = int(np.searchsorted(time_N, time_N[0], side="right"))
            repeated_N[:end] |= np.isin(hash_N[:end], self._seen)
        self._remember(time_N, hash_N)
        return repeated_N

    def _remember(self, time_N: Array, hash_N: Array) -> None:
        last = int(time_N[-1])
        begin = np.searchsorted(time_N, last)
        latest = hash_N[begin:]
        seen = np.unique(latest)
        if last == self._time:
            seen = np.union1d(self._seen, seen)
        self._seen = seen
        self._time = last
