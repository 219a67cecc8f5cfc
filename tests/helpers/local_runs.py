"""Run the roles of a run one after the other in the engine's workers, without Ray.

Jobs, loop, scorer and stores are the same. Only the feed differs: it reads the same fragments in
the same order in the worker itself. A run takes 2 s instead of 40 s; one test checks that both are
equal.
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
    """Writes rank 0's rows straight to the files."""

    path: Path
    job: str

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        Recorder(self.path).metrics(rows)

    def progress(self, window: int, examples: int) -> None:
        pass

    def timeline(self, rows: Sequence[dict[str, Any]]) -> None:
        Recorder(self.path).timeline([{"role": self.job, **row} for row in rows])


class DiedError(Exception):
    """Raised in a worker in place of a kill."""


def train(
    job: Job,
    windows: Sequence[int],
    dies_at: int | None,
    batches: int | None = None,
) -> None:
    """Run a worker's part of a job from its latest checkpoint.

    Args:
        dies_at: window in which the worker dies: after its figures and before its checkpoint, or
            after `batches` of it.
    """
    done = job.checkpoints.latest()
    report = None
    if dist.get_rank() == 0:
        report = LocalReport(job.config.folder / "metrics.jsonl", job.name)
    dist.barrier()
    worker = Worker(job, None, report, torch.device("cpu"))
    worker.loop.client = LocalClient(worker.loop.reader, job.passes(windows, done))  # type: ignore[assignment]
    save = worker._save
    on_batch_end = worker._on_batch_end

    def dying_save(cursor: Any, window: int | None) -> None:
        if window == dies_at and not cursor.examples:
            raise DiedError
        save(cursor, window)

    def dying_on_batch_end(
        window_pass: Any,
        progress: Any,
        group: int,
    ) -> None:
        on_batch_end(window_pass, progress, group)
        if window_pass.window == dies_at and progress.batches == batches:
            raise DiedError

    if dies_at is not None:
        worker._save = dying_save  # type: ignore[method-assign]
        worker._on_batch_end = dying_on_batch_end  # type: ignore[method-assign]
    with suppress(DiedError):
        worker.run(windows, done)
    worker.saver.finish()


def score(config: Config, windows: Sequence[int] | None = None) -> int:
    """Run the DAS in this process over `windows` (None: all); return how many rows it scored."""
    stream = EventStream.open(config.folder / "stream")
    return Labeler(config, stream).label_locally(stream.windows() if windows is None else windows)


def predictions(config: Config, rows: int) -> dict[str, Any]:
    """Logits of the trained models, from the last checkpoint, on the stream's first rows."""
    (job,) = vm_jobs(config)
    worker = Worker(job, None, None, torch.device("cpu"))
    job.checkpoints.load(job.checkpoints.latest(), worker.loop)
    stream = EventStream.open(config.folder / "stream")
    batch = to_batch(stream.read(0, stream.window(0).fragments[0]).slice(0, rows), stream.schema)
    return {trainer.name: trainer.engine.predict(batch).numpy() for trainer in worker.loop.trainers}


def run_locally(groups: dict[int, Workers], config: Config) -> dict[str, Any]:
    """Run FM, DAS and VMs, each to the end of the stream; return the summary."""
    stream = prepare_stream(config)
    groups[config.fm.workers].run(train, Job("fm", config), stream.windows(), None)
    groups[1].run(score, config)
    for job in vm_jobs(config):
        groups[config.vm.workers].run(train, job, stream.windows(), None)
    return PipelineRunner(config, stream).summarize()


def with_inputs(
    base: Config,
    folder: Path,
    name: str,
    *parts: str,
    **changes: Any,
) -> Config:
    """A run with copies of the stream and of `parts` of the undisturbed run `base`."""
    config = small_config(folder, name, **changes)
    for part in ("stream", *parts):
        shutil.copytree(base.folder / part, config.folder / part)
    return config


def files(config: Config, *folders: str) -> dict[str, bytes]:
    """Content of all weight files in some folders of a run, by path."""
    contents = {}
    for folder in folders:
        for path in (config.folder / folder).rglob("*.safetensors"):
            contents[str(path.relative_to(config.folder))] = path.read_bytes()
    return contents
