"""A run's roles one after the other in the engine's workers, without Ray: the same jobs, loop,
scorer and stores.

Only the feed is another one, which reads the same fragments in the same order in the worker itself.
It takes 2 s where Ray takes 40; one test holds the two equal.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_runs import small_config
from workers import Workers

from exfm_ray.config.root import Config
from exfm_ray.das.labeler import Labeler
from exfm_ray.data.batch import to_batch
from exfm_ray.data.stream import EventStream
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.runner import PipelineRunner
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.tracking.recorder import Recorder
from exfm_ray.training.job import Job
from exfm_ray.training.local import LocalClient
from exfm_ray.training.worker import Worker


@dataclass
class LocalReport:
    """Rank 0's rows go straight to the files."""

    path: Path
    job: str

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        Recorder(self.path).metrics(rows)

    def progress(self, window: int, examples: int) -> None:
        pass

    def timeline(self, rows: Sequence[dict[str, Any]]) -> None:
        Recorder(self.path).timeline([{"role": self.job, **row} for row in rows])


class DiedError(Exception):
    """Stands for a kill."""


def train(
    job: Job,
    windows: Sequence[int],
    dies_at: int | None,
    batches: int | None = None,
) -> None:
    """A worker's part of a job, from its latest checkpoint on.

    Args:
        dies_at: ends in that window: after its figures, before its checkpoint, or after so many
            `batches` of it.
    """
    done = job.checkpoints.latest()
    report = (
        LocalReport(job.config.folder / "metrics.jsonl", job.name) if dist.get_rank() == 0 else None
    )
    dist.barrier()
    worker = Worker(job, None, report, torch.device("cpu"))
    worker.loop.client = LocalClient(worker.loop.reader, job.passes(windows, done))  # type: ignore[assignment]
    save = worker._save
    on_batch_end = worker._between

    def dying_save(mark: Any, window: int | None) -> None:
        if window == dies_at and not mark.examples:
            raise DiedError
        save(mark, window)

    def dying_between(
        work: Any,
        under: Any,
        group: int,
    ) -> None:
        on_batch_end(work, under, group)
        if work.window == dies_at and under.batches == batches:
            raise DiedError

    if dies_at is not None:
        worker._save, worker._between = dying_save, dying_between  # type: ignore[method-assign]
    with suppress(DiedError):
        worker.run(windows, done)
    worker.saver.finish()


def score(config: Config, windows: Sequence[int] | None = None) -> int:
    """The DAS of a run, in this process, over all windows or over `windows`; rows scored."""
    stream = EventStream.open(config.folder / "stream")
    return Labeler(config, stream).label_locally(stream.windows() if windows is None else windows)


def predictions(config: Config, rows: int) -> dict[str, Any]:
    """Logits of trained lanes, from the last checkpoint, on the stream's first rows."""
    (job,) = vm_jobs(config)
    worker = Worker(job, None, None, torch.device("cpu"))
    job.checkpoints.load(job.checkpoints.latest(), worker.loop)
    stream = EventStream.open(config.folder / "stream")
    batch = to_batch(stream.read(0, stream.window(0).fragments[0]).slice(0, rows), stream.schema)
    return {lane.name: lane.engine.predict(batch).numpy() for lane in worker.loop.lanes}


def run_locally(groups: dict[int, Workers], config: Config) -> dict[str, Any]:
    """FM, DAS and VMs, each to the end of the stream; the summary."""
    stream = prepare_stream(config)
    groups[config.fm.workers].run(train, Job("fm", config), stream.windows(), None)
    groups[1].run(score, config)
    for job in vm_jobs(config):
        groups[config.vm.workers].run(train, job, stream.windows(), None)
    return PipelineRunner(config, stream).summarise()


def with_inputs(
    base: Config,
    folder: Path,
    name: str,
    *parts: str,
    **changes: Any,
) -> Config:
    """A run that finds stream, and what else is named, of the undisturbed one."""
    config = small_config(folder, name, **changes)
    for part in ("stream", *parts):
        shutil.copytree(base.folder / part, config.folder / part)
    return config


def files(config: Config, *folders: str) -> dict[str, bytes]:
    """All weights that a run has published or exported."""
    found = [path for folder in folders for path in (config.folder / folder).rglob("*.safetensors")]
    return {str(path.relative_to(config.folder)): path.read_bytes() for path in found}
