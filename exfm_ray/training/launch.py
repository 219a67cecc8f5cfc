"""Ray Train around a job: starts its workers and its feed, and gives back its result or its
error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import ray

from exfm_ray.data.feed import FEED_WAIT_S, LOOK_S, Feed
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.runtime.actors import get_with_timeout, pin_to_driver_node
from exfm_ray.runtime.session import user_error
from exfm_ray.storage.remote import poll_interval
from exfm_ray.training.checkpoint import BEGINNING, Cursor
from exfm_ray.training.job import Job

COLLECTIVE_WAIT_S = 4 * FEED_WAIT_S
"""Longest wait of a worker for the others in a collective operation; each of them may itself wait
for the feed, which gives up sooner."""
RESTARTS = 5
"""How often an elastic job is started again after losing workers."""
NO_ROOM = "WorkerGroupStartupTimeoutError"
"""Ray Train's own, not public name of the error of a try that ended without room."""
ADVICE = "\nFailed to apply UDF transform"
"""From here on Ray Data's own advice, which it puts behind the message of an error in a read
task."""
START_TRIES = 60
"""How often Ray Train asks for room for a job's workers; each time it waits a minute, and a node
may join meanwhile."""


class _RecorderReport:
    """Rank 0's end of the recorder actor."""

    def __init__(self, recorder: Any, job: str) -> None:
        self._recorder = recorder
        self._job = job

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        get_with_timeout(
            self._recorder.metrics.remote(list(rows)),
            f"worker 0 of {self._job}",
            "the recorder to write its figures",
        )

    def progress(self, window: int, examples: int) -> None:
        self._recorder.progress.remote(self._job, window, examples)

    def timeline(self, rows: Sequence[dict[str, Any]]) -> None:
        told = [{"role": self._job, **row} for row in rows]
        get_with_timeout(
            self._recorder.timeline.remote(told),
            f"worker 0 of {self._job}",
            "the recorder to write its timeline",
        )


def start_feed(job: Job, windows: Sequence[int]) -> Any:
    """The actor that reads for a job what it has still to do. To kill it ends the job: its workers
    fail at their next block."""
    workers = job.trainer.workers
    reader = job.reader(EventStream.open(job.stream_root).schema)
    passes = job.passes(windows, job.checkpoints.latest())
    labels = job.config.placement.data
    place: dict[str, Any] = (
        {"label_selector": labels} if labels else {"scheduling_strategy": pin_to_driver_node()}
    )
    actor = Feed.options(max_concurrency=2 * workers + 2, **place)  # type: ignore[attr-defined]
    return actor.remote(
        reader, passes, workers, FEED_WAIT_S, labels, poll_interval(job.stream_root, LOOK_S)
    )


def run_job(
    job: Job,
    windows: Sequence[int],
    recorder: Any,
    feed: Any,
) -> None:
    """Run a job to its end, from its latest checkpoint on; `feed`: what `start_feed` gave.

    An elastic job (`min_workers`) that loses workers is started again with as many as there are
    room for, `RESTARTS` times at most. UserError where there is no room for its workers, and the
    one that a worker has met: no job is started again after that.
    """
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from exfm_ray.training.fail_fast import FailFastCallback

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault(
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0"
    )  # a process more at each start, for a notice that nothing here uses
    trainer = job.trainer
    logs = job.config.folder / "logs"
    cuda = trainer.device == "cuda"
    elastic = trainer.min_workers
    settings = {"job": job, "windows": list(windows), "feed": feed, "recorder": recorder}
    tries = (
        RESTARTS if elastic else START_TRIES
    )  # elastic: the next try is for as many as Ray Train sees by then
    trainer_of_ray = TorchTrainer(
        lambda: _train(
            settings
            # As `train_loop_config` they would be read, and all that they import, by Ray Train's
            # controller, too
        ),
        scaling_config=ScalingConfig(
            num_workers=(elastic, trainer.workers) if elastic else trainer.workers,
            use_gpu=cuda,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if cuda else {})},
            label_selector=job.labels or None,
        ),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if cuda else "gloo", timeout_s=int(COLLECTIVE_WAIT_S)
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=str(logs / "ray_train"),
            callbacks=[FailFastCallback(feed)],
            failure_config=FailureConfig(
                max_failures=RESTARTS if elastic else 0, controller_failure_limit=tries
            ),
        ),
    )
    try:
        trainer_of_ray.fit()
    except ControllerError as error:
        if isinstance(error.controller_failure, UserError):
            raise error.controller_failure from None
        if type(error.controller_failure).__name__ != NO_ROOM:
            raise
        raise UserError(
            f"{job.name} waited {tries + 1} minutes for room for its workers (a CPU{' and a GPU' if cuda else ''} each), which other roles or runs "
            f"hold or the cluster has not; let nodes join, or lower {job.role}.workers: the same command goes on"
        ) from None


def _train(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    job: Job = settings["job"]
    rank = ray.train.get_context().get_world_rank()
    with redirect_output(job.config.folder / "logs" / f"{job.name}.rank{rank}.log"):
        try:
            _work(job, rank, settings)
        except Exception as error:
            mistake = user_error(error)
            if mistake:
                told = str(mistake).partition(ADVICE)[0]
                get_with_timeout(
                    settings["feed"].report_failure.remote(told),
                    f"worker {rank} of {job.name}",
                    "the feed to take its error",
                )
            raise


def _work(
    job: Job,
    rank: int,
    settings: dict[str, Any],
) -> None:
    import torch

    from exfm_ray.training.worker import (
        Worker,
    )  # seconds that neither the driver nor Ray Train's controller need spend

    if job.trainer.threads:
        torch.set_num_threads(job.trainer.threads)
    device = torch.device("cpu")
    if job.trainer.device == "cuda":
        device = ray.train.torch.get_device()
    begun: list[Cursor | None] = [None]
    if rank == 0:
        begun = [job.checkpoints.latest()]
        passes = job.passes(settings["windows"], begun[0] or BEGINNING)
        get_with_timeout(
            settings["feed"].restart.remote(passes, torch.distributed.get_world_size()),
            f"worker 0 of {job.name}",
            "its feed",
        )
    torch.distributed.broadcast_object_list(
        begun
    )  # all go on from the same checkpoint, and none asks the feed before it has begun
    report = _RecorderReport(settings["recorder"], job.name) if rank == 0 else None
    Worker(job, settings["feed"], report, device).run(settings["windows"], begun[0] or BEGINNING)
    torch.distributed.barrier()  # a worker that leaves first may abort the others


@contextmanager
def redirect_output(path: Path) -> Iterator[None]:
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
