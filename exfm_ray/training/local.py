"""Run a training job without Ray: the same trainers, loop and files in this process.

For the trials of sweeps, benchmarks and tests.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from exfm_ray.data.readers import FragmentReader, WindowPass
from exfm_ray.data.stream import EventStream
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.training.checkpoint import BEGINNING
from exfm_ray.training.group import BatchGroup
from exfm_ray.training.job import Job
from exfm_ray.training.loop import Loop
from exfm_ray.training.worker import build_groups


class LocalClient:
    """Reads the fragments of passes in order, on demand, in this process.

    Attributes:
        waited: seconds spent reading.
    """

    def __init__(self, reader: FragmentReader, passes: Sequence[WindowPass]) -> None:
        """Read the fragments of `passes` through `reader`."""
        self.waited = 0.0
        self._reader = reader
        self._passes = passes
        self._tables = self._read()

    def fragments(self, count: int) -> Iterator[pa.Table]:
        """The next `count` fragments."""
        for _ in range(count):
            started = time.perf_counter()
            table = next(self._tables)
            self.waited += time.perf_counter() - started
            yield table

    def _read(self) -> Iterator[pa.Table]:
        for window_pass in self._passes:
            for fragment in self._reader.fragments(window_pass):
                yield self._reader.read(window_pass, fragment)


class InMemoryReport:
    """A report that keeps the rows of metrics.jsonl in memory.

    Attributes:
        rows: of metrics.jsonl.
    """

    def __init__(self) -> None:
        """Start without rows."""
        self.rows: list[dict[str, Any]] = []

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append to `rows`."""
        self.rows += rows

    def progress(self, window: int, examples: int) -> None:
        """Ignore the progress."""

    def timeline(self, rows: Sequence[dict[str, Any]]) -> None:
        """Ignore the timeline."""


def init_single_process() -> None:
    """Make a process group of this process alone unless there is a group already."""
    if dist.is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
    )
    dist.init_process_group("gloo")


def local_loop(
    job: Job,
    windows: Sequence[int],
    reader: FragmentReader | None = None,
    groups: Sequence[BatchGroup] | None = None,
) -> tuple[Loop, InMemoryReport]:
    """The loop of a job, ready to run `windows` from fresh models, and its report.

    Args:
        reader: of the job's rows, instead of the one that reads the run's folder.
        groups: instead of the job's own trainers.
    """
    init_single_process()
    schema = EventStream.open(job.stream_root).schema
    torch.manual_seed(job.config.seed)
    reader = reader or job.reader(schema)
    client: Any = LocalClient(reader, job.passes(windows, BEGINNING))
    report = InMemoryReport()
    loop = Loop(
        role=job.role,
        seed=job.config.seed,
        groups=groups or build_groups(job, schema, torch.device("cpu")),
        reader=reader,
        client=client,
        report=report,
        policy=SnapshotPolicy.from_config(job.config.das),
        warmup_windows=job.config.metrics.warmup_windows,
    )
    return loop, report
