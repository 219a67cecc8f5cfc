"""Ray Train around a job: starts its workers and its feed, and gives back its result or its error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import ray

from exfm_ray.data.feed import Feed
from exfm_ray.data.stream import EventStream
from exfm_ray.training.job import Job, Worker

FEED_WAIT_S = 3600.0
"""Longest that a job waits for a window or its supervision."""


class _RecorderReport:
    """Rank 0's end of the recorder actor."""

    def __init__(self, recorder: Any, job: str) -> None:
        self._recorder, self._job = recorder, job

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        ray.get(self._recorder.metrics.remote(list(rows)))

    def progress(self, window: int, examples: int) -> None:
        self._recorder.progress.remote(self._job, window, examples)

    def timeline(self, rows: Sequence[dict[str, Any]]) -> None:
        ray.get(self._recorder.timeline.remote([{"role": self._job, **row} for row in rows]))


def start_feed(job: Job, windows: Sequence[int]) -> Any:
    """The actor that reads for a job what it has still to do. To kill it ends the job: its workers fail at their next block."""
    workers, reader = job.trainer.workers, job.reader(EventStream.open(job.stream_root).schema)
    passes = job.passes(windows, job.checkpoints.latest())
    labels = job.config.placement.data
    actor = Feed.options(max_concurrency=workers + 2, label_selector=labels)  # type: ignore[attr-defined]
    return actor.remote(reader, passes, workers, FEED_WAIT_S, labels)


def run_job(job: Job, windows: Sequence[int], recorder: Any, feed: Any) -> None:
    """Run a job to its end, from its latest checkpoint on; `feed`: what `start_feed` gave."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    trainer, logs = job.trainer, job.config.folder / "logs"
    done = job.checkpoints.latest()
    cuda = trainer.device == "cuda"
    TorchTrainer(
        _train,
        train_loop_config={"job": job, "windows": list(windows), "done": done, "feed": feed, "recorder": recorder},
        scaling_config=ScalingConfig(
            num_workers=trainer.workers, use_gpu=cuda, resources_per_worker={"CPU": 1, **({"GPU": 1} if cuda else {})},
            label_selector=job.labels or None,
        ),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cuda else "gloo"),
        run_config=RunConfig(
            name=job.name, storage_path=str(logs / "ray_train"), failure_config=FailureConfig(max_failures=0, controller_failure_limit=0)
        ),
    ).fit()


def _train(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    context = ray.train.get_context()
    job: Job = settings["job"]
    rank = context.get_world_rank()
    with chatter_to(job.config.folder / "logs" / f"{job.name}.rank{rank}.log"):
        import torch

        if job.trainer.threads:
            torch.set_num_threads(job.trainer.threads)
        device = torch.device("cpu")
        if job.trainer.device == "cuda":
            device = ray.train.torch.get_device()
        report = _RecorderReport(settings["recorder"], job.name) if rank == 0 else None
        Worker(job, settings["feed"], report, device).run(settings["windows"], settings["done"])
        torch.distributed.barrier()  # a worker that leaves first may abort the others


@contextmanager
def chatter_to(path: Path) -> Iterator[None]:
    """Send this process's output, logging and that of its libraries to a file."""
    import logging

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        handler = logging.StreamHandler(log)
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
