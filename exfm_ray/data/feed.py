"""Feeds a job's workers through Ray Data: one actor reads fragments in order and ahead of need, and
every worker gets the same ones.

A training job is a list of passes: a window, and whether it is evaluated or learned. The feed turns
the passes that are ready into a Ray Data dataset with one read task a fragment, and hands out the
blocks in order. Each worker then takes its rows of every global batch (`worker_slice`). So the
examples in a batch do not depend on the number of workers, all workers take the same number of
steps, and no example is dropped. `streaming_split` promises neither. A block lies in shared memory
once per node, however many workers of that node read it.
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
POLL_S = 0.1
FEED_WAIT_S = 3600.0
"""Longest that a job waits for a window or its supervision."""
READ_S = 1800.0
"""Longest that the reading of a block may take once its window is there."""
READERS_WITHOUT_CPU = 2
"""Concurrent read tasks that request no CPU from Ray."""

ReadTasks = Sequence[tuple[WindowPass, Fragment]]


def _datasource(reader: FragmentReader, tasks: ReadTasks) -> Any:
    """A Ray Data source with one read task, and so one block, for each fragment."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def read_task(window_pass: WindowPass, fragment: Fragment) -> ReadTask:
        metadata = BlockMetadata(
            num_rows=None,
            size_bytes=fragment.bytes,
            input_files=[fragment.file],
            exec_stats=None,
        )
        return ReadTask(lambda: [reader.read(window_pass, fragment)], metadata)

    class Fragments(Datasource):  # type: ignore[misc]  # ray has no types
        def estimate_inmemory_data_size(self) -> int | None:
            sizes = [fragment.bytes for _, fragment in tasks]
            return sum(sizes)

        def get_read_tasks(
            self,
            parallelism: int,
            per_task_row_limit: int | None = None,
            data_context: Any = None,
        ) -> list[ReadTask]:
            return [read_task(window_pass, fragment) for window_pass, fragment in tasks]

    return Fragments()


class _Reading:
    """One reading of some passes for a number of workers. A thread reads until `stop`."""

    def __init__(
        self,
        reader: FragmentReader,
        passes: Sequence[WindowPass],
        workers: int,
        wait_s: float,
        labels: Mapping[str, str],
        poll_s: float,
        restarted: bool = False,
    ) -> None:
        """Start to read.

        Args:
            reader: reads the fragments.
            passes: what is read, in order.
            workers: number of workers that take every block.
            wait_s: longest wait for a pass to become ready.
            labels: of the nodes that read.
            poll_s: pause between two checks whether a pass is ready.
            restarted: some workers were lost. The remaining ones may hold every CPU, so the read
                tasks request none and share theirs.
        """
        self.passes = tuple(passes)
        self.workers = workers
        self.untouched = True
        self._resources: dict[str, int] = {}
        if restarted:
            self._resources = {"num_cpus": 0, "concurrency": READERS_WITHOUT_CPU}
        self._reader = reader
        self._wait_s = wait_s
        self._labels = dict(labels)
        self._poll_s = poll_s

        self._blocks: deque[Any] = deque()
        self._first = 0  # index of the first block still held
        self._taken = [0] * workers
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()

    def stop(self) -> None:
        """End the reading. Workers that still wait for a block get an error."""
        stopped = RuntimeError("the feed was restarted for other workers")
        with self._changed:
            self._error = self._error or stopped
            self._blocks.clear()
            self._changed.notify_all()

    def block(self, worker: int, index: int) -> list[Any]:
        """See `Feed.block`."""
        timeout_s = self._wait_s + READ_S
        with self._changed:
            self.untouched = False
            self._taken[worker] = index
            self._free_passed_blocks()
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._error is not None or self._is_read(index), timeout_s
            )
            if self._is_read(index):
                return [self._blocks[index - self._first]]
            if self._error:
                raise self._error
            raise UserError(
                f"worker {worker} waited {timeout_s:.0f} s for block {index} of its feed, which "
                "Ray Data has not read; are there CPUs left for it? "
                f"workers' places in the feed: {self._taken}"
            )

    def _is_read(self, index: int) -> bool:
        end = self._first + len(self._blocks)
        return index < end

    def _free_passed_blocks(self) -> None:
        """Drop the blocks that all workers have passed."""
        passed = min(self._taken)
        while self._first < passed:
            self._blocks.popleft()
            self._first += 1

    def _run(self) -> None:
        try:
            waiting = deque(self.passes)
            while waiting and not self._error:
                tasks = self._take_ready(waiting)
                for ref in self._read(tasks):
                    if not self._add(ref):
                        return
        except BaseException as error:  # a thread's error must reach the workers, whatever it is
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _add(self, ref: Any) -> bool:
        """Add a block, then wait while enough blocks are read ahead. False after an error."""
        with self._changed:
            if self._error:
                return False
            self._blocks.append(ref)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: len(self._blocks) < BLOCKS_AHEAD or self._error is not None
            )
            return True

    def _take_ready(self, waiting: deque[WindowPass]) -> list[tuple[WindowPass, Fragment]]:
        """Wait for the first pass, then remove and return all ready passes at the head."""
        self._wait_until_ready(waiting[0])
        tasks: list[tuple[WindowPass, Fragment]] = []
        while waiting and len(tasks) <= FRAGMENTS_PER_DATASET:
            if not self._reader.ready(waiting[0]):
                break
            window_pass = waiting.popleft()
            for fragment in self._reader.fragments(window_pass):
                tasks.append((window_pass, fragment))
        return tasks

    def _wait_until_ready(self, window_pass: WindowPass) -> None:
        """Wait for a pass; UserError after `wait_s` seconds. Returns early after an error."""
        deadline = time.monotonic() + self._wait_s
        while not self._reader.ready(window_pass) and not self._error:
            if time.monotonic() > deadline:
                missing = self._reader.missing_input(window_pass)
                raise UserError(f"the feed waited {self._wait_s:.0f} s for {missing}")
            time.sleep(self._poll_s)

    def _read(self, tasks: ReadTasks) -> Iterator[Any]:
        if not tasks:  # only empty windows
            return
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.target_max_block_size = None  # one block a fragment, never split or merged

        source = _datasource(self._reader, tasks)
        labels = self._labels or None
        dataset = ray.data.read_datasource(
            source, override_num_blocks=len(tasks), label_selector=labels, **self._resources
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
        poll_s: float = POLL_S,
    ) -> None:
        """Start to read.

        Args:
            reader: reads the fragments.
            passes: what is read, in order.
            workers: number of workers that take every block.
            wait_s: longest wait for a pass to become ready. Then the job fails and names what is
                missing.
            labels: of the nodes that read.
            poll_s: pause between two checks whether a pass is ready.
        """
        self._reader = reader
        self._wait_s = wait_s
        self._labels = labels or {}
        self._poll_s = poll_s
        self._failure: str | None = None
        self._reading = _Reading(reader, passes, workers, wait_s, self._labels, poll_s)

    def restart(self, passes: Sequence[WindowPass], workers: int) -> None:
        """Start again with the first of `passes`, from which `block` now counts.

        Called when workers start, maybe again and in another number.

        Raises:
            UserError: earlier workers failed with an error that the new ones would meet again.
        """
        if self._failure:
            raise UserError(self._failure)
        reading = self._reading
        same = reading.passes == tuple(passes) and reading.workers == workers
        if same and reading.untouched:
            return
        reading.stop()
        self._reading = _Reading(
            self._reader,
            passes,
            workers,
            self._wait_s,
            self._labels,
            self._poll_s,
            restarted=True,
        )

    def report_failure(self, message: str) -> None:
        """Record an error of a worker that no restart can fix.

        The first one stays, because later ones may follow from it.
        """
        self._failure = self._failure or message

    def failed(self) -> str | None:
        """The recorded error that no restart can fix, or None."""
        return self._failure

    def block(self, worker: int, index: int) -> list[Any]:
        """Wait until block `index` is read and return its reference in a list of one.

        Frees the blocks that all workers have passed.
        """
        return self._reading.block(worker, index)


class FeedClient:
    """A worker's end of the feed.

    Attributes:
        waited: seconds spent waiting for data.
    """

    def __init__(
        self,
        feed: Any,
        worker: int,
        wait_s: float = 3 * FEED_WAIT_S,
    ) -> None:
        """Connect a worker to its feed.

        Args:
            feed: handle of the `Feed` actor.
            worker: number of this worker.
            wait_s: longest wait for a block. The feed itself gives up sooner, with a better
                message.
        """
        self._feed = feed
        self._worker = worker
        self._index = 0
        self._wait_s = wait_s
        self._next: Any = None
        self.waited = 0.0

    def fragments(self, count: int) -> Iterator[pa.Table]:
        """Yield the next `count` fragments and request one ahead of the current one."""
        caller = f"worker {self._worker}"
        for _ in range(count):
            started = time.perf_counter()
            index = self._index
            pending = self._next or self._request(index)
            block = get_with_timeout(pending, caller, f"block {index} of its feed", self._wait_s)
            self._index += 1
            self._next = self._request(self._index)
            table: pa.Table = get_with_timeout(block[0], caller, f"the rows of block {index}")
            self.waited += time.perf_counter() - started
            yield table

    def _request(self, index: int) -> Any:
        return self._feed.block.remote(self._worker, index)


@dataclass(frozen=True)
class WorkerSlice:
    """A worker's rows of one global batch.

    Attributes:
        table: the rows; up to `length`. Slices of the last workers may be shorter or empty.
        length: the same for all workers.
        total: rows of the global batch.
    """

    table: pa.Table
    length: int
    total: int


def worker_slice(
    batch: pa.Table,
    worker: int,
    workers: int,
) -> WorkerSlice:
    """This worker's rows of a global batch."""
    total = batch.num_rows
    length = -(-total // workers)
    table = batch.slice(worker * length, length)
    return WorkerSlice(table, length, total)
