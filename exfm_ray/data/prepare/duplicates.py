"""Events that stand twice: equal content at an equal event time, found without keeping the stream
in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from exfm_ray.data.prepare.encode import splitmix64

Array = np.ndarray[Any, Any]


def fold(hashes: Array, column: Array) -> Array:
    """Fold one more column of 8-byte values into the row hashes: uint64 (N,)."""
    return splitmix64(hashes ^ np.ascontiguousarray(column).view(np.uint64))


def fold_bag(hashes: Array, bag: pa.Array) -> Array:
    """Fold a list<int32> column into the row hashes; order within a list matters."""
    offsets = bag.offsets.to_numpy().astype(np.int64)
    lengths = np.diff(offsets)
    values = bag.flatten().to_numpy().astype(np.uint64)
    place = (np.arange(len(values)) - np.repeat(offsets[:-1] - offsets[0], lengths)).astype(
        np.uint64
    )
    sums = np.concatenate(
        [
            np.zeros(1, np.uint64),
            np.cumsum(splitmix64(values ^ (place << np.uint64(32))), dtype=np.uint64),
        ]
    )
    ends = offsets - offsets[0]
    return fold(hashes, (sums[ends[1:]] - sums[ends[:-1]]) ^ lengths.astype(np.uint64))


class DuplicateFinder:
    """Finds rows whose (time, hash) came before. Remembers only the hashes of the latest time it
    has seen."""

    def __init__(self) -> None:
        self._time: int | None = None
        self._seen = np.empty(0, np.uint64)

    def repeated(self, times: Array, hashes: Array) -> Array:
        """Which of the rows, in event order (times int64 (N,), not decreasing; hashes uint64 (N,)),
        are repetitions: bool (N,)."""
        if not len(times):
            return np.zeros(0, bool)
        order = np.lexsort((hashes, times))
        same = (np.diff(times[order]) == 0) & (np.diff(hashes[order]) == 0)
        repeated = np.zeros(len(times), bool)
        repeated[order[1:]] = same  # lexsort is stable: the first of equals stays
        head = int(np.searchsorted(times, times[0], side="right"))
        if times[0] == self._time:
            repeated[:head] |= np.isin(hashes[:head], self._seen)
        self._remember(times, hashes)
        return repeated

    def _remember(self, times: Array, hashes: Array) -> None:
        last = int(times[-1])
        tail = np.unique(hashes[np.searchsorted(times, last) :])
        self._seen = np.union1d(self._seen, tail) if last == self._time else tail
        self._time = last
