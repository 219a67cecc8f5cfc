"""Read blocks through a feed on a Ray whose object store has 80 MB: `small_store.py BYTES`.

BYTES is the size of a block. The script prints what was received.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray

from exfm_ray.data.feed import Feed, FeedClient
from exfm_ray.data.readers import WindowPass
from exfm_ray.data.stream import Fragment

STORE = 80_000_000
WORKERS = 2
WINDOWS = 2
FRAGMENTS = 6


@dataclass(frozen=True)
class Blocks:
    """A reader of blocks that contain their own number repeatedly."""

    bytes: int

    def ready(self, window_pass: WindowPass) -> bool:
        return True

    def missing_input(self, window_pass: WindowPass) -> str:
        return "nothing"

    def fragments(self, window_pass: WindowPass) -> Sequence[Fragment]:
        numbers = range(window_pass.window * FRAGMENTS, (window_pass.window + 1) * FRAGMENTS)
        return [
            Fragment(file=str(number), rows=self.bytes // 8, bytes=self.bytes, domain_rows=())
            for number in numbers
        ]

    def read(self, window_pass: WindowPass, fragment: Fragment) -> pa.Table:
        return pa.table({"number": np.full(fragment.rows, int(fragment.file))})


@ray.remote(num_cpus=0)
def consume(
    feed: object,
    worker: int,
    reader: Blocks,
    passes: Sequence[WindowPass],
) -> list[tuple[int, int, int]]:
    """Return first and last value and number of rows of every block.

    The last two blocks are kept in memory, as a training loop may keep them.
    """
    client = FeedClient(feed, worker)
    blocks = []
    recent = list[pa.Table]()
    for window_pass in passes:
        for table in client.fragments(len(reader.fragments(window_pass))):
            numbers = table["number"]
            blocks.append((numbers[0].as_py(), numbers[-1].as_py(), table.num_rows))
            recent = [*recent[-1:], table]
    return blocks


def main() -> None:
    ray.init(num_cpus=3, object_store_memory=STORE, include_dashboard=False, log_to_driver=False)
    reader = Blocks(int(sys.argv[1]))
    passes = [WindowPass(window, "learn") for window in range(WINDOWS)]
    feed = Feed.options(max_concurrency=WORKERS + 2).remote(reader, passes, WORKERS, 60)  # type: ignore[attr-defined]
    print(
        json.dumps(
            ray.get([consume.remote(feed, worker, reader, passes) for worker in range(WORKERS)])
        )
    )


if __name__ == "__main__":
    main()
