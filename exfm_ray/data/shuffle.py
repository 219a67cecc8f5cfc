"""The rows of a static set in another order each pass."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from exfm_ray.data.feed import Pass, StreamReader
from exfm_ray.data.stream import Fragment


@dataclass(frozen=True)
class ShuffledReader(StreamReader):
    """For passes that learn, the fragments come in an order drawn from the seed and the pass, and so do the rows of each fragment.

    Rows stay within their fragment: `data.fragment_rows` is the buffer of the shuffle. Passes that evaluate keep the order.
    """

    seed: int = 0

    def fragments(self, work: Pass) -> Sequence[Fragment]:
        fragments = super().fragments(work)
        if work.purpose == "evaluate":
            return fragments
        return [fragments[i] for i in self._generator(work, 0).permutation(len(fragments))]

    def read(self, work: Pass, fragment: Fragment) -> pa.Table:
        table = super().read(work, fragment)
        if work.purpose == "evaluate":
            return table
        return table.take(pa.array(self._generator(work, zlib.crc32(fragment.file.encode())).permutation(table.num_rows)))

    def _generator(self, work: Pass, part: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, work.number, work.window, part])
