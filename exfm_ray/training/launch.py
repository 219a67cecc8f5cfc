"""Runs a job on Ray Train: starts its workers and its feed, and raises its error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from exfm_ray.data.feed import FEED_WAIT_S, POLL_S, Feed
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.runtime.actors import get_with_timeout, pin_to_driver_node
from exfm_ray.runtime.session import user_error
from exfm_ray.storage.remote import poll_interval
from exfm_ray.training.checkpoint import BEGINNING, Cursor
from exfm_ray.training.job import Job

COLLECTIVE_WAIT_S = 4 * FEED_WAIT_S
"""Longest wait of a worker for the others in a collective operation.

Each of them may itself wait for the feed, which gives up sooner.
"""
RESTARTS = 5
"""How often an elastic job is started again after losing workers."""
NO_ROOM = "WorkerGroupStartupTimeoutError"
"""Name of Ray Train's non-public error that ends an attempt without resources."""
ADVICE = "\nFailed to apply UDF transform"
"""Start of the advice that Ray Data appends to the message of an error in a read task."""
START_TRIES = 60
"""How often Ray Train requests resources for a job's workers.

Each attempt waits a minute, in which a node may join.
"""


class _RecorderReport:
    """Rank 0's client of the recorder actor."""

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
        with_role = [{"role": self._job, **row} for row in rows]
        get_with_timeout(
            self._recorder.timeline.remote(with_role),
            f"worker 0 of {self._job}",
            "the recorder to write its timeline",
        )


@dataclass(frozen=True)
class _Task:
    """What each worker of a job needs."""

    job: Job
    windows: list[int]
    feed: Any
    recorder: Any


def start_feed(job: Job, windows: Sequence[int]) -> Any:
    """Start the actor that reads what a job has still to learn.

    Killing it ends the job: its workers fail at their next block.
    """
    workers = job.trainer.workers
    stream = EventStream.open(job.stream_root)
    reader = job.reader(stream.schema)
    done = job.checkpoints.latest()
    passes = job.passes(windows, done)
    labels = job.config.placement.data
    placement: dict[str, Any] = (
        {"label_selector": labels} if labels else {"scheduling_strategy": pin_to_driver_node()}
    )
    actor = Feed.options(max_concurrency=2 * workers + 2, **placement)  # type: ignore[attr-defined]
    poll_s = poll_interval(job.stream_root, POLL_S)
    return actor.remote(reader, passes, workers, FEED_WAIT_S, labels, poll_s)


def run_job(
    job: Job,
    windows: Sequence[int],
    recorder: Any,
    feed: Any,
) -> None:
    """Run a job from its latest checkpoint to its end.

    An elastic job (`min_workers`) that loses workers is restarted with as many as the cluster has
    resources for, `RESTARTS` times at most.

    Args:
        feed: the actor that `start_feed` returned.

    Raises:
        UserError: there are no resources for the workers, or a worker raised a UserError. Such a
            job is not restarted.
    """
    from ray.train import ControllerError

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # The watcher is one more process at each start, and nothing here uses its notice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # An elastic job's next attempt is for as many workers as Ray Train sees by then.
    attempts = RESTARTS if job.trainer.min_workers else START_TRIES
    ray_trainer = _ray_trainer(_Task(job, list(windows), feed, recorder), attempts)
    try:
        ray_trainer.fit()
    except ControllerError as error:
        cause = error.controller_failure
        if isinstance(cause, UserError):
            raise cause from None
        if type(cause).__name__ == NO_ROOM:
            raise _no_resources(job, attempts) from None
        raise


def _ray_trainer(task: _Task, attempts: int) -> Any:
    """The Ray Train trainer of a job, which requests resources `attempts` times."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from exfm_ray.training.fail_fast import FailFastCallback

    job = task.job
    trainer = job.trainer
    use_gpu = trainer.device == "cuda"
    min_workers = trainer.min_workers
    resources = {"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1}

    scaling = ScalingConfig(
        num_workers=(min_workers, trainer.workers) if min_workers else trainer.workers,
        use_gpu=use_gpu,
        resources_per_worker=resources,
        label_selector=job.labels or None,
    )
    failure = FailureConfig(
        max_failures=RESTARTS if min_workers else 0, controller_failure_limit=attempts
    )
    run = RunConfig(
        name=job.name,
        storage_path=str(job.config.folder / "logs" / "ray_train"),
        callbacks=[FailFastCallback(task.feed)],
        failure_config=failure,
    )
    backend = "cpu:gloo,cuda:nccl" if use_gpu else "gloo"
    return TorchTrainer(
        # Ray Train's controller would unpickle a `train_loop_config` too, and so import all that
        # the task needs.
        lambda: _train(task),
        scaling_config=scaling,
        torch_config=TorchConfig(backend=backend, timeout_s=int(COLLECTIVE_WAIT_S)),
        run_config=run,
    )


def _no_resources(job: Job, attempts: int) -> UserError:
    """The error of a job whose workers could not be started."""
    needs = "1 CPU and 1 GPU" if job.trainer.device == "cuda" else "1 CPU"
    return UserError(
        f"{job.name}: no resources for its workers after {attempts + 1} minutes ({needs} each); "
        "other roles or runs use them, or the cluster is too small. "
        f"Add nodes or lower {job.role}.workers, then rerun the same command to resume"
    )


def _train(task: _Task) -> None:
    """Run a worker in Ray Train's process; report a UserError to the feed."""
    job = task.job
    rank = ray.train.get_context().get_world_rank()
    with redirect_output(job.config.folder / "logs" / f"{job.name}.rank{rank}.log"):
        try:
            _run_worker(task, rank)
        except Exception as error:
            mistake = user_error(error)
            if mistake:
                message = str(mistake).partition(ADVICE)[0]
                get_with_timeout(
                    task.feed.report_failure.remote(message),
                    f"worker {rank} of {job.name}",
                    "the feed to take its error",
                )
            raise


def _run_worker(task: _Task, rank: int) -> None:
    # imported here because neither the driver nor Ray Train's controller needs to spend the seconds
    import torch

    from exfm_ray.training.worker import Worker

    job = task.job
    if job.trainer.threads:
        torch.set_num_threads(job.trainer.threads)
    use_gpu = job.trainer.device == "cuda"
    device = ray.train.torch.get_device() if use_gpu else torch.device("cpu")

    done: list[Cursor] = [BEGINNING]
    if rank == 0:
        done = [job.checkpoints.latest()]
        passes = job.passes(task.windows, done[0])
        get_with_timeout(
            task.feed.restart.remote(passes, torch.distributed.get_world_size()),
            f"worker 0 of {job.name}",
            "its feed",
        )
    # All workers resume from the same checkpoint, and none reads from the feed before it restarts.
    torch.distributed.broadcast_object_list(done)

    report = _RecorderReport(task.recorder, job.name) if rank == 0 else None
    Worker(job, task.feed, report, device).run(task.windows, done[0])
    torch.distributed.barrier()  # a worker that leaves first may abort the others


@contextmanager
def redirect_output(path: Path) -> Iterator[None]:
    """Send the output and the logging of this process and its libraries to a file."""
    import logging

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        handler = logging.StreamHandler(log)
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
