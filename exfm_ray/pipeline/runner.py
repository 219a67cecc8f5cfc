"""Run FM, DAS and VMs over the windows of a stream, side by side.

The roles are ordered by what lies on disk: the FM publishes snapshots, a DAS scores a window when
the snapshot that supervises it exists, a VM learns a window when its supervision is committed. So
they can be started together or one after the other, killed and restarted, with the same result.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import ray

from exfm_ray.config.root import Config
from exfm_ray.das.labeler import Labeler
from exfm_ray.data.stream import EventStream
from exfm_ray.pipeline.preflight import check_inputs, check_static
from exfm_ray.pipeline.progress import POLL_S, ProgressMonitor, examples_left
from exfm_ray.pipeline.run_dir import initialize_run_dir, run_log
from exfm_ray.pipeline.schedule import ALL_ROLES, Role, Schedule, Workload, training_jobs
from exfm_ray.pipeline.summary import write_summary
from exfm_ray.runtime.actors import pin_to_driver_node
from exfm_ray.runtime.memory import MemoryMeter
from exfm_ray.runtime.session import ray_session
from exfm_ray.storage.atomic import write_text
from exfm_ray.storage.locks import acquire_role_lock
from exfm_ray.tracking.progress import ProgressView
from exfm_ray.tracking.recorder import RecorderActor
from exfm_ray.tracking.wandb_pipeline import PipelineRuns
from exfm_ray.training.job import Job
from exfm_ray.training.launch import run_job, start_feed

STOP_S = 60.0
"""Longest wait for the other jobs to end once one has failed."""

logger = logging.getLogger(__name__)


def daemon_future(name: str, work: Callable[[], None]) -> Future[None]:
    """Run a function in a thread that does not keep the process alive."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=name).start()
    return future


@dataclass
class PipelineRunner:
    """One run in its folder."""

    config: Config
    stream: EventStream

    def __post_init__(self) -> None:
        self.folder = self.config.folder
        teachers = (None, *self.config.teachers)
        self.labelers = [Labeler(self.config, self.stream, teacher) for teacher in teachers]
        self.schedule = Schedule(self.config, self.stream, self.labelers)
        self.memory = MemoryMeter()

    def execute(self, roles: frozenset[Role] = ALL_ROLES) -> bool:
        """Run these roles side by side to the end of the stream.

        A stream that is still open is processed as far as it has come. Only missing work is done
        (rule 5).

        Returns:
            False if there was nothing to do.

        Raises:
            UserError: another process is running one of the roles. In a cluster, where drivers
                share a DAS, the DAS is exempt.
        """
        check_static(self.config, self.schedule.windows, roles)
        initialize_run_dir(self.config)
        acquire_role_lock(self.folder, _exclusive_roles(roles))

        jobs = training_jobs(self.config, roles)
        self._set_aside_damaged_checkpoints(jobs)
        workload = self.schedule.workload(jobs, roles)
        for labeler in self.labelers:
            readers = workload.jobs_taught_by(labeler.store.teacher)
            labeler.readers = [job.checkpoints.root for job in readers]
        if workload.is_empty:
            return False

        check_inputs(self.config, self.labelers, workload, roles)
        self._run(workload)
        return True

    def summarize(self) -> dict[str, Any]:
        """Write summary.json from the checkpoints and the stores.

        Returns:
            What was written.
        """
        return write_summary(
            self.config, self.stream, self.schedule.windows, self.labelers, self.memory.peak
        )

    def _set_aside_damaged_checkpoints(self, jobs: Sequence[Job]) -> None:
        with run_log(self.folder):
            for job in jobs:
                for message in job.checkpoints.set_aside_damaged():
                    logger.warning("%s", message)

    def _run(self, workload: Workload) -> None:
        """Start all roles of the workload and wait for them."""
        error_file = self.folder / "logs" / "error.txt"
        error_file.unlink(missing_ok=True)
        run_is_over = threading.Event()
        with (
            ray_session(self.config),
            closing(PipelineRuns(self.config, self.summarize)),
            ProgressView(examples_left(self.stream, workload)) as view,
        ):
            actor = RecorderActor.options(scheduling_strategy=pin_to_driver_node())
            recorder = actor.remote(self.folder / "metrics.jsonl")
            monitor = ProgressMonitor(view, recorder, self.memory, self.folder / "logs")
            feeds = self._start_jobs(workload, recorder, monitor)
            self._start_labelers(workload, monitor, run_is_over)
            try:
                # Fail here if the recorder cannot start: the roles report to it alone.
                monitor.state()
                self._label_by_fm(workload, monitor)
                self._wait_for_roles(workload, monitor)
            except Exception:
                # A killed run leaves no such file: it is unfinished, not failed.
                write_text(error_file, traceback.format_exc())
                raise
            finally:
                run_is_over.set()
                for feed in feeds:
                    ray.kill(feed)
                # The other jobs end when they lose their feeds. Wait before Ray shuts down.
                wait(monitor.pending, STOP_S)
            view.update(monitor.state())

    def _start_jobs(
        self,
        workload: Workload,
        recorder: Any,
        monitor: ProgressMonitor,
    ) -> list[Any]:
        """Start a feed and a thread for each training job; returns the feeds."""
        feeds = [start_feed(job, workload.learnable[job.name]) for job in workload.jobs]
        for job, feed in zip(workload.jobs, feeds, strict=True):
            windows = workload.learnable[job.name]
            future = _start_job(job, windows, recorder, feed)
            monitor.pending[future] = job
        return feeds

    def _start_labelers(
        self,
        workload: Workload,
        monitor: ProgressMonitor,
        run_is_over: threading.Event,
    ) -> None:
        """Start a thread for the DAS of each teacher other than the FM."""
        for labeler in self.labelers[1:]:
            windows = workload.scoring.get(labeler.spec.role)
            if windows:
                future = _start_labeler(labeler, windows, monitor, run_is_over)
                monitor.pending[future] = labeler

    def _label_by_fm(self, workload: Workload, monitor: ProgressMonitor) -> None:
        """Run the DAS of the FM in this thread."""
        labeler = self.labelers[0]
        windows = workload.scoring.get(labeler.spec.role, [])

        def on_scored(window: int, rows: int) -> None:
            monitor.report_scored(labeler.spec.role, window, rows)
            monitor.poll()

        with monitor.collect_failed():
            labeler.run(windows, on_scored, monitor.poll)

    def _wait_for_roles(self, workload: Workload, monitor: ProgressMonitor) -> None:
        """Wait until every role has finished, or cannot continue because labeling has failed."""
        while not self._nothing_can_continue(workload, monitor):
            monitor.poll()
            time.sleep(POLL_S)
        if monitor.failed_labelings:
            raise monitor.failed_labelings[0]

    def _nothing_can_continue(self, workload: Workload, monitor: ProgressMonitor) -> bool:
        for worker in monitor.pending.values():
            if not monitor.failed_labelings:
                return False
            if not self.schedule.is_blocked(worker, workload.learnable):
                return False
        return True


def _exclusive_roles(roles: frozenset[Role]) -> list[Role]:
    """The roles that one process at a time may run. Drivers in a cluster share one DAS."""
    in_cluster = bool(os.environ.get("RAY_ADDRESS"))
    exclusive = roles - {Role.DAS} if in_cluster else roles
    return [role for role in Role if role in exclusive]


def _start_job(
    job: Job,
    windows: Sequence[int],
    recorder: Any,
    feed: Any,
) -> Future[None]:
    return daemon_future(job.name, lambda: run_job(job, windows, recorder, feed))


def _start_labeler(
    labeler: Labeler,
    windows: Sequence[int],
    monitor: ProgressMonitor,
    run_is_over: threading.Event,
) -> Future[None]:
    def stop_if_over() -> None:
        if run_is_over.is_set():
            raise RuntimeError("the run is over")

    def on_scored(window: int, rows: int) -> None:
        monitor.report_scored(labeler.spec.role, window, rows)
        stop_if_over()

    return daemon_future(labeler.spec.role, lambda: labeler.run(windows, on_scored, stop_if_over))
