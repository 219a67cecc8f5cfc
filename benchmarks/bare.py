"""A training job without Ray: the same lanes, loop and files in one process. What the overhead is measured against."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from exfm_ray.data.feed import FragmentReader, Pass
from exfm_ray.data.stream import EventStream
from exfm_ray.training.job import Job, build_groups
from exfm_ray.training.loop import Loop
from exfm_ray.training.static import EarlyStopping


class BareClient:
    """Reads the passes' fragments in order when they are asked for. `waited`: seconds that reading took."""

    def __init__(self, reader: FragmentReader, passes: Sequence[Pass]) -> None:
        self._tables = (reader.read(work, fragment) for work in passes for fragment in reader.fragments(work))

        self.waited = 0.0

    def fragments(self, count: int) -> Iterator[pa.Table]:
        """The next `count` fragments."""
        for _ in range(count):
            started = time.perf_counter()
            table = next(self._tables)
            self.waited += time.perf_counter() - started
            yield table


class Rows:
    """Keeps the rows of metrics.jsonl in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows += rows

    def progress(self, window: int, examples: int) -> None:
        pass


def one_process() -> None:
    """A process group of this process alone."""
    if dist.is_initialized():
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo")


def bare_static(job: Job) -> tuple[list[dict[str, Any]], EarlyStopping]:
    """Passes over the job's static set until early stopping; the best pass's rows, and how it went."""
    windows = EventStream.open(job.stream_root).windows()
    static = job.static(windows)
    assert static
    loop, _ = bare_loop(job, windows)
    stopping, best = EarlyStopping(static.config), []
    while not stopping.over:
        rows = loop.run_passes(static.works(stopping.last + 1), stopping.last + 1)
        best = rows if stopping.take(rows) else best
    return best, stopping


def bare_loop(job: Job, windows: Sequence[int]) -> tuple[Loop, Rows]:
    """The job's loop, ready to run `windows`."""
    one_process()
    schema = EventStream.open(job.stream_root).schema
    torch.manual_seed(job.config.seed)
    report, reader = Rows(), job.reader(schema)
    client: Any = BareClient(reader, job.passes(windows, 0))
    groups = build_groups(job, schema, torch.device("cpu"))
    loop = Loop(
        role=job.role, seed=job.config.seed, groups=groups, reader=reader, client=client, report=report,
        fm_lag=job.config.das.fm_lag, warmup_windows=job.config.metrics.warmup_windows,
    )  # fmt: skip
    return loop, report
