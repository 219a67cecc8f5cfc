"""A training job without Ray: the same lanes, loop and files in this process. For sweeps' trials,
benchmarks and tests."""

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
    """The passes' fragments in order, read here when they are asked for. `waited`: seconds that
    reading took."""

    def __init__(self, reader: FragmentReader, passes: Sequence[WindowPass]) -> None:
        self.waited = 0.0
        self._tables = (
            reader.read(work, fragment) for work in passes for fragment in reader.fragments(work)
        )

    def fragments(self, count: int) -> Iterator[pa.Table]:
        """The next `count` fragments."""
        for _ in range(count):
            started = time.perf_counter()
            table = next(self._tables)
            self.waited += time.perf_counter() - started
            yield table


class InMemoryReport:
    """A report that keeps the rows of metrics.jsonl in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep them."""
        self.rows += rows

    def progress(self, window: int, examples: int) -> None:
        """Nobody looks."""

    def timeline(self, rows: Sequence[dict[str, Any]]) -> None:
        """Nobody looks."""


def init_single_process() -> None:
    """Make a process group of this process alone, where there is none."""
    if dist.is_initialized():
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
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
    """The job's loop, ready to run `windows` from fresh models.

    Args:
        reader: of the job's rows, where they are not read from the run's folder.
        groups: what learns, where it is not the job's own lanes.
    """
    init_single_process()
    schema = EventStream.open(job.stream_root).schema
    torch.manual_seed(job.config.seed)
    report = InMemoryReport()
    reader = reader or job.reader(schema)
    client: Any = LocalClient(reader, job.passes(windows, BEGINNING))
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
