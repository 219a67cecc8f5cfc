"""Ray Data to the workers: one actor reads fragments in order, ahead of need, and every worker gets
the same ones.

A training job's work is a list of passes (a window, and whether it is evaluated or learnt). The
feed turns the passes that are ready into a Ray Data dataset, one read task a fragment, and hands
out the blocks in order. Each worker then takes its rows of every global batch (`share`). So the
examples in a batch do not depend on the number of workers, steps agree on all of them, and no
example is dropped; `streaming_split` promises neither. A block lies in shared memory once per node,
however many workers of that node read it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from exfm_ray.data.readers import FragmentReader, WindowPass
from exfm_ray.data.stream import Fragment
from exfm_ray.errors import UserError
from exfm_ray.runtime.actors import get_with_timeout

FRAGMENTS_PER_DATASET = 256
BLOCKS_AHEAD = 4
LOOK_S = 0.1
FEED_WAIT_S = 3600.0
"""Longest that a job waits for a window or its supervision."""
READ_S = 1800.0
"""Longest that the reading of a block may take once its window is there."""
READERS_WITHOUT_CPU = 2
"""Read tasks side by side that ask Ray for no CPU."""


def _datasource(reader: FragmentReader, work: Sequence[tuple[WindowPass, Fragment]]) -> Any:
    """A Ray Data source with one read task, and so one block, for each fragment."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Fragments(Datasource):  # type: ignore[misc]  # ray has no types
        def estimate_inmemory_data_size(self) -> int | None:
            return sum(fragment.bytes for _, fragment in work)

        def get_read_tasks(
            self,
            parallelism: int,
            per_task_row_limit: int | None = None,
            data_context: Any = None,
        ) -> list[ReadTask]:
            return [
                ReadTask(
                    lambda task=task, fragment=fragment: [reader.read(task, fragment)],
                    BlockMetadata(
                        num_rows=None,
                        size_bytes=fragment.bytes,
                        input_files=[fragment.file],
                        exec_stats=None,
                    ),
                )
                for task, fragment in work
            ]

    return Fragments()


class _Reading:
    """One reading of some passes for a number of workers; ends when it is told to stop.

    `again`: after the loss of workers those that are left may hold every CPU, so the read tasks ask
    for none and share theirs.
    """

    def __init__(
        self,
        reader: FragmentReader,
        passes: Sequence[WindowPass],
        workers: int,
        wait_s: float,
        labels: Mapping[str, str],
        look_s: float,
        again: bool = False,
    ) -> None:
        self.of = (tuple(passes), workers)
        self._asks: dict[str, int] = (
            {"num_cpus": 0, "concurrency": READERS_WITHOUT_CPU} if again else {}
        )
        self.untouched = True
        self._reader = reader
        self._wait_s = wait_s
        self._labels = dict(labels)
        self._look_s = look_s
        self._blocks: deque[Any] = deque()
        self._first = 0  # index of the first block still held
        self._taken = [0] * workers
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """End the reading; who still waits for a block gets an error."""
        with self._changed:
            self._error = self._error or RuntimeError("the feed was begun anew for other workers")
            self._blocks.clear()
            self._changed.notify_all()

    def block(self, worker: int, index: int) -> list[Any]:
        """See `Feed.block`."""
        bound = self._wait_s + READ_S
        with self._changed:
            self.untouched = False
            self._taken[worker] = index
            while self._first < min(self._taken):
                self._blocks.popleft()
                self._first += 1
            self._changed.notify_all()
            there = self._changed.wait_for(
                lambda: self._error is not None or index < self._first + len(self._blocks), bound
            )
            if index < self._first + len(self._blocks):
                return [self._blocks[index - self._first]]
            raise (
                self._error
                if there and self._error
                else UserError(
                    f"worker {worker} waited {bound:.0f} s for block {index} of its feed, which Ray Data has not read; "
                    f"are there CPUs left for it? workers' places in the feed: {self._taken}"
                )
            )

    def _run(self) -> None:
        try:
            waiting = deque(self.of[0])
            while waiting and not self._error:
                for ref in self._read(self._take_ready(waiting)):
                    with self._changed:
                        if self._error:
                            return
                        self._blocks.append(ref)
                        self._changed.notify_all()
                        self._changed.wait_for(
                            lambda: len(self._blocks) < BLOCKS_AHEAD or self._error is not None
                        )
        except BaseException as error:  # a thread's error must reach the workers, whatever it is
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _take_ready(self, waiting: deque[WindowPass]) -> list[tuple[WindowPass, Fragment]]:
        """Remove and return the passes at the head that are ready: at least one, after waiting for
        it."""
        deadline = time.monotonic() + self._wait_s
        while not self._reader.ready(waiting[0]) and not self._error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the feed waited {self._wait_s:.0f} s for {self._reader.missing_input(waiting[0])}"
                )
            time.sleep(self._look_s)
        work: list[tuple[WindowPass, Fragment]] = []
        while waiting and len(work) <= FRAGMENTS_PER_DATASET and self._reader.ready(waiting[0]):
            task = waiting.popleft()
            work += [(task, fragment) for fragment in self._reader.fragments(task)]
        return work

    def _read(self, work: Sequence[tuple[WindowPass, Fragment]]) -> Iterator[Any]:
        if not work:  # only empty windows
            return
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.target_max_block_size = None  # one block a fragment, never split or merged
        source = _datasource(self._reader, work)
        labels = self._labels or None
        dataset = ray.data.read_datasource(
            source, override_num_blocks=len(work), label_selector=labels, **self._asks
        )
        for bundle in dataset.iter_internal_ref_bundles():
            for block in bundle.blocks:
                yield block.ref


@ray.remote(num_cpus=0)
class Feed:
    """Reads a job's passes ahead of its workers. Needs max_concurrency of at least workers + 2."""

    def __init__(
        self,
        reader: FragmentReader,
        passes: Sequence[WindowPass],
        workers: int,
        wait_s: float,
        labels: Mapping[str, str] | None = None,
        look_s: float = LOOK_S,
    ) -> None:
        """`wait_s`: longest wait for a pass to become ready, after which the job fails with what
        was missing. `labels`: of the nodes that read. `look_s`: pause between two looks whether a
        pass is ready."""
        self._reader = reader
        self._wait_s = wait_s
        self._labels = labels or {}
        self._look_s = look_s
        self._failed: str | None = None
        self._reading = _Reading(reader, passes, workers, wait_s, self._labels, look_s)

    def restart(self, passes: Sequence[WindowPass], workers: int) -> None:
        """Workers start, maybe again and in another number: from now on `block` counts from the
        first of `passes`.

        UserError where workers before them have failed by a fault that they would meet again.
        """
        if self._failed:
            raise UserError(self._failed)
        if not (self._reading.untouched and self._reading.of == (tuple(passes), workers)):
            self._reading.stop()
            self._reading = _Reading(
                self._reader, passes, workers, self._wait_s, self._labels, self._look_s, again=True
            )

    def report_failure(self, told: str) -> None:
        """A worker has met an error that no restart mends; the first one stands, for others may
        follow from it."""
        self._failed = self._failed or told

    def failed(self) -> str | None:
        """The error that no restart mends, if a worker has met one."""
        return self._failed

    def block(self, worker: int, index: int) -> list[Any]:
        """The reference of block `index`, in a list; blocks until it is read. Frees blocks that all
        workers have passed."""
        return self._reading.block(worker, index)


class FeedClient:
    """A worker's end of the feed. `waited`: seconds spent waiting for data."""

    def __init__(
        self,
        feed: Any,
        worker: int,
        wait_s: float = 3 * FEED_WAIT_S,
    ) -> None:
        """`wait_s`: longest wait for a block; the feed itself gives up sooner and knows more."""
        self._feed = feed
        self._worker = worker
        self._index = 0
        self._wait_s = wait_s
        self._next: Any = None
        self.waited = 0.0

    def fragments(self, count: int) -> Iterator[pa.Table]:
        """The next `count` fragments, the one after the current asked for ahead."""
        for _ in range(count):
            started = time.perf_counter()
            pending = self._next or self._feed.block.remote(self._worker, self._index)
            ref = get_with_timeout(
                pending, f"worker {self._worker}", f"block {self._index} of its feed", self._wait_s
            )[0]
            self._index += 1
            self._next = self._feed.block.remote(self._worker, self._index)
            table: pa.Table = get_with_timeout(
                ref, f"worker {self._worker}", f"the rows of block {self._index - 1}"
            )
            self.waited += time.perf_counter() - started
            yield table


@dataclass(frozen=True)
class WorkerSlice:
    """A worker's rows of one global batch of `total` rows. All workers' shares are of length
    `length`; the last ones may hold fewer rows than that (`table.num_rows`), down to none."""

    table: pa.Table
    length: int
    total: int


def worker_slice(
    batch: pa.Table,
    worker: int,
    workers: int,
) -> WorkerSlice:
    """This worker's rows of a global batch."""
    length = -(-batch.num_rows // workers)
    return WorkerSlice(batch.slice(worker * length, length), length, batch.num_rows)
