"""The schedule of FM, DAS and VMs over the windows of a stream.

The three roles run side by side. What orders them lies on disk: the FM publishes snapshots, the DAS
scores a window when the snapshot that may score it is there, a VM learns a window when its
supervision is committed. So they can be started together or one after the other, killed and started
again, with the same result.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import ray

from exfm_ray.config.arms import LABELS
from exfm_ray.config.root import Config
from exfm_ray.das.client import LabelingFailedError
from exfm_ray.das.labeler import Labeler
from exfm_ray.das.spec import failed_items, fallback_windows
from exfm_ray.data.feed import FEED_WAIT_S
from exfm_ray.data.labels.releases import released_windows
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.pipeline.run_dir import initialize_run_dir
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.pipeline.summary import summary_rows
from exfm_ray.runtime.actors import get_with_timeout, pin_to_driver_node
from exfm_ray.runtime.memory import MemoryMeter
from exfm_ray.runtime.session import ray_session
from exfm_ray.storage.atomic import append_text, read_json, write_json, write_text
from exfm_ray.storage.locks import acquire_role_lock
from exfm_ray.tracking.progress import ProgressView
from exfm_ray.tracking.recorder import TIMELINE, RecorderActor, read_metrics, read_timeline
from exfm_ray.tracking.wandb_pipeline import PipelineRuns
from exfm_ray.training.checkpoint import BEGINNING, JobResult
from exfm_ray.training.job import Job, fm_tasks
from exfm_ray.training.launch import run_job, start_feed

POLL_S = 0.2
STALL_S = 3 * FEED_WAIT_S
"""Longest time in which no role learns, or scores, a single batch."""
STOP_S = 60.0
"""Longest wait for the other jobs to end once one has failed."""


def daemon_future(name: str, work: Callable[[], None]) -> Future[None]:
    """Work in a thread that does not keep the process from ending."""
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
        self._open = not self.stream.complete  # asked first: what is there by then is seen below
        self.windows = released_windows(self.stream, fm_tasks(self.config, self.stream.schema))
        self.labelers = [
            Labeler(self.config, self.stream, teacher) for teacher in (None, *self.config.teachers)
        ]
        self._over = threading.Event()
        self.memory = MemoryMeter()
        self.learnable: dict[
            str, list[int]
        ] = {}  # by job; fixed for a call of execute, for a followed stream grows meanwhile
        self._pending: dict[Future[None], Job | Labeler] = {}
        self._parked: list[LabelingFailedError] = []
        self._recorder: Any = None

    def learnable_windows(
        self,
        job: Job,
        fm: bool,
        das: bool,
    ) -> list[int]:
        """The windows that a job can learn by now: released for its tasks and, where the stream
        goes on, supervised or about to be."""
        if job.role == "fm":
            return self.windows
        windows = released_windows(self.stream, job.tasks())
        if not self._open or set(self.config.vm.arms) == {LABELS}:
            return windows
        own = next(own for own in self.labelers if own.store.teacher == job.teacher)
        shares = any(
            arm.shares_tables for arm in self.config.vm.arms
        )  # what is exported is given the rows of the snapshot for the next window

        def learnable(window: int) -> bool:
            supervised = not own.missing([window]) or (
                das and self._snapshot_available(own, window, fm)
            )
            return supervised and (not shares or self._snapshot_available(own, window + 1, fm))

        return list(takewhile(learnable, windows))

    def scorable_windows(self, own: Labeler, fm: bool) -> list[int]:
        """Windows that a DAS can score by now."""
        return own.missing(
            [w for w in self.stream.windows() if self._snapshot_available(own, w, fm)]
        )

    def _snapshot_available(
        self,
        own: Labeler,
        window: int,
        fm: bool,
    ) -> bool:
        """Whether the snapshot that supervises a window is there, or of windows that the FM learns
        in this call; all are, where the stream has ended."""
        version = own.order.policy.version(window)
        if not self._open or version is None:
            return True
        return own.snapshots.has(version) or (
            fm and own.teacher is None and version <= len(self.windows)
        )

    def execute(
        self,
        fm: bool = True,
        das: bool = True,
        vm: bool = True,
    ) -> bool:
        """Run the roles asked for, side by side, to the end of the stream, or of what is there by
        now of one that is followed; False when there was nothing to do. Rule 5: only what is
        missing is done.

        UserError where another process is at work on one of them; in a cluster, whose drivers share
        a DAS, not for the DAS.
        """
        self._check_static(das)
        initialize_run_dir(self.config)
        acquire_role_lock(
            self.folder,
            [
                role
                for role, asked in (
                    ("fm", fm),
                    ("das", das and not os.environ.get("RAY_ADDRESS")),
                    ("vm", vm),
                )
                if asked
            ],
        )
        jobs = ([Job("fm", self.config)] if fm else []) + (vm_jobs(self.config) if vm else [])
        for told in [told for job in jobs for told in job.checkpoints.set_aside_damaged()]:
            print(f"warning: {told}", file=sys.stderr)
            append_text(self.folder / "logs" / "driver.log", told)
        self.learnable = {job.name: self.learnable_windows(job, fm, das) for job in jobs}
        jobs = [job for job in jobs if not job.finished(self.learnable[job.name])]
        scoring = (
            {own.order.role: self.scorable_windows(own, fm) for own in self.labelers} if das else {}
        )
        scoring = {role: missing for role, missing in scoring.items() if missing}
        for own in self.labelers:
            own.readers = [
                job.checkpoints.root
                for job in jobs
                if job.role == "vm" and job.teacher == own.store.teacher
            ]
        if not jobs and not scoring:
            return False
        self._check_inputs(fm, das, [job for job in jobs if job.role == "vm"], scoring)
        failure = self.folder / "logs" / "error.txt"
        failure.unlink(missing_ok=True)
        with (
            ray_session(self.config),
            closing(PipelineRuns(self.config, self.summarise)),
            ProgressView(self._totals(jobs, scoring)) as view,
        ):
            self._recorder = RecorderActor.options(scheduling_strategy=pin_to_driver_node()).remote(
                self.folder / "metrics.jsonl"
            )
            feeds = [start_feed(job, self.learnable[job.name]) for job in jobs]
            self._parked = []
            self._pending = {
                self._start(job, feed): job for job, feed in zip(jobs, feeds, strict=True)
            }
            self._pending |= {
                self._start_das(own, scoring[own.order.role]): own
                for own in self.labelers[1:]
                if own.order.role in scoring
            }
            watch = self._watcher(view)
            try:
                # Where the recorder cannot begin, nothing else is told; all start beside it
                self._progress()
                own = self.labelers[0]
                with self._collect_failed():
                    own.run(
                        scoring.get(own.order.role, []),
                        lambda window, rows: self._scored(own, window, rows, watch),
                        watch,
                    )
                while not all(
                    self._parked and self._is_blocked(role) for role in self._pending.values()
                ):
                    watch()
                    time.sleep(POLL_S)
                if self._parked:
                    raise self._parked[0]
            except Exception:
                write_text(
                    failure, traceback.format_exc()
                )  # a killed run leaves none: it is unfinished, not failed
                raise
            finally:
                self._over.set()
                for feed in feeds:
                    ray.kill(feed)
                wait(
                    self._pending, STOP_S
                )  # the other jobs end by the loss of their feeds, before Ray goes
            view.update(self._progress())
        return True

    @contextmanager
    def _collect_failed(self) -> Iterator[None]:
        """A DAS that ends without some windows ends no other role: what they can do, they do
        first."""
        try:
            yield
        except LabelingFailedError as error:
            self._parked.append(error)

    def _is_blocked(self, role: Job | Labeler) -> bool:
        """Whether a role can go no further once windows are parked: a job that has learnt all
        windows before its first one without supervision, or a DAS whose teacher such a job may
        be."""
        if isinstance(role, Labeler):
            return role.teacher is not None and not role.teacher.run
        if role.role == "fm" or set(self.config.vm.arms) == {LABELS}:
            return False
        windows = self.learnable[role.name]
        lacking = next(own for own in self.labelers if own.store.teacher == role.teacher).missing(
            windows
        )
        return bool(lacking) and role.checkpoints.latest().windows >= windows.index(lacking[0])

    def _progress(self) -> dict[str, tuple[int, int]]:
        """Job -> (window it is at, examples done)."""
        state: dict[str, tuple[int, int]] = get_with_timeout(
            self._recorder.state.remote(), "the run", "its recorder"
        )
        return state

    def _start(self, job: Job, feed: Any) -> Future[None]:
        return daemon_future(
            job.name, lambda: run_job(job, self.learnable[job.name], self._recorder, feed)
        )

    def _start_das(self, das: Labeler, windows: Sequence[int]) -> Future[None]:
        """Have the DAS of another teacher than the FM work beside it."""

        def watch() -> None:
            if self._over.is_set():
                raise RuntimeError("the run is over")

        return daemon_future(
            das.order.role,
            lambda: das.run(
                windows, lambda window, rows: self._scored(das, window, rows, watch), watch
            ),
        )

    def _check_inputs(
        self,
        fm: bool,
        das: bool,
        vms: Sequence[Job],
        scoring: Mapping[str, Sequence[int]],
    ) -> None:
        """UserError where a role would wait for ever: for what is not there and no role of this run
        makes."""
        for own in self.labelers:
            if (
                own.teacher
                and own.teacher.run
                and own.order.role in scoring
                and not own.snapshots.versions()
            ):
                raise UserError(
                    f"{own.snapshots.root}: no snapshot of teacher '{own.teacher.name}'; train it first, with das.keep_snapshots"
                )
            made_here = bool(vms) if own.teacher else fm
            for window in scoring.get(own.order.role, []) if not made_here else ():
                version = own.order.policy.version(window)
                if version is not None and not own.snapshots.has(version):
                    command = "train-vm" if own.teacher else "train-fm"
                    raise UserError(
                        f"window {window} is to be scored by {own.snapshots.folder(version)}, which is not there; run {command} first"
                    )
        for own in self.labelers if not das and set(self.config.vm.arms) != {LABELS} else ():
            self._check_supervised(own, vms)

    def _check_supervised(self, das: Labeler, vms: Sequence[Job]) -> None:
        lacking = das.missing(
            sorted(
                {
                    w
                    for job in vms
                    if job.teacher == das.store.teacher
                    for w in self.learnable[job.name]
                }
            )
        )
        if lacking:
            raise UserError(
                f"{das.store.root}: no supervision of window {lacking[0]} by '{das.store.teacher}'; run das first"
            )

    def _check_static(self, das: bool) -> None:
        """UserError where a static set is asked for what needs time, or lacks windows."""
        static = Job("fm", self.config).static(self.windows)
        if static and das:
            raise UserError(
                "fm.static is set: a static set has no order in time and so no DAS; run train-fm, or remove fm.static"
            )
        if static and (not static.learnt or static.config.validation_window not in self.windows):
            raise UserError(
                f"setting 'fm.static.validation_window' is {static.config.validation_window}, the stream has windows "
                f"{self.windows[0]} to {self.windows[-1]}; windows before it are learnt (data.window.by=file makes each file a window)"
            )

    def _totals(self, jobs: Sequence[Job], scoring: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Examples that each role has still to do."""
        sizes = {w: self.stream.window(w) for w in self.stream.windows()}
        totals = {}
        for job in jobs:
            done = job.checkpoints.latest()
            left = [
                work.window
                for work in job.passes(self.learnable[job.name], done)
                if work.purpose == "learn"
            ]
            domains = [self.stream.schema.domain_index(s.domain) for s in job.students]
            rows = sum(
                sum(f.domain_rows[d] for d in domains) if domains else f.rows
                for w in left
                for f in sizes[w].fragments
            )
            totals[job.name] = rows - done.examples
        return totals | {
            role: sum(sizes[w].rows for w in missing) for role, missing in scoring.items()
        }

    def _scored(
        self,
        das: Labeler,
        window: int,
        rows: int,
        watch: Callable[[], None],
    ) -> None:
        self._recorder.progress.remote(das.order.role, window, rows)
        watch()

    def _watcher(self, view: ProgressView) -> Callable[[], None]:
        """A function that shows progress, measures memory and raises the error of a job that has
        failed."""
        last = [0.0]
        moved: list[tuple[float, dict[str, tuple[int, int]]]] = [(time.monotonic(), {})]

        def watch() -> None:
            if time.monotonic() - last[0] < POLL_S:
                return
            last[0] = time.monotonic()
            self.memory.sample()
            state = self._progress()
            view.update(state)
            moved[0] = (moved[0][0] if state == moved[0][1] else last[0], state)
            if last[0] - moved[0][0] > STALL_S:
                at = (
                    ", ".join(f"{job} at window {window}" for job, (window, _) in state.items())
                    or "none has begun"
                )
                raise UserError(
                    f"no role has moved for {STALL_S:.0f} s ({at}); are there CPUs or GPUs for all? logs: {self.folder / 'logs'}"
                )
            for job in [job for job in self._pending if job.done()]:
                del self._pending[job]
                with self._collect_failed():
                    job.result()

        return watch

    def summarise(self) -> dict[str, Any]:
        """Write summary.json from the jobs' checkpoints; returns it."""
        results = {
            job.name: self._result(job) for job in [Job("fm", self.config), *vm_jobs(self.config)]
        }
        found = {name: result for name, result in results.items() if result}
        spans = read_timeline(self.folder / TIMELINE)
        scored = {own.order.role: own.done(spans) for own in self.labelers}
        path = self.folder / "summary.json"
        roles = {name: {"seconds": r.seconds, "examples": r.examples} for name, r in found.items()}
        static = Job("fm", self.config).static(self.windows)
        summary = {
            "name": self.config.name,
            "seed": self.config.seed,
            "windows": static.held_out
            if static
            else [w for w in self.windows if w >= self.config.metrics.warmup_windows],
            "figures": self._best_pass()
            if static
            else summary_rows(self.config, self.stream, found.values()),
            "roles": roles
            | {
                role: {"seconds": seconds, "examples": examples}
                for role, (seconds, examples) in scored.items()
            },
            "parked": [row for own in self.labelers for row in failed_items(own.order)],
            "fallback_windows": [
                row for own in self.labelers for row in fallback_windows(own.order)
            ],
            "peak_memory_bytes": max(self.memory.peak, _peak(path)),
        }
        write_json(path, summary)
        return summary

    def _best_pass(self) -> list[dict[str, Any]]:
        """Figures of a static set: the best pass's rows of the validation window and of the
        tests."""
        stopping = Job("fm", self.config).checkpoints.stopping()
        return [
            row
            for row in read_metrics(self.folder / "metrics.jsonl")
            if stopping and row["pass"] == stopping["best"]
        ]

    def _result(self, job: Job) -> JobResult | None:
        done = job.checkpoints.latest()
        return job.checkpoints.result(done) if done != BEGINNING else None


def _peak(path: Path) -> int:
    """The peak memory of the run's commands before this one, of its summary."""
    found = read_json(path) if path.exists() else {"peak_memory_bytes": 0}
    peak = found.get("peak_memory_bytes") if isinstance(found, dict) else None
    if not isinstance(peak, int):
        raise UserError(
            f"{path}: holds no peak_memory_bytes; it is damaged: remove it, and give the command again, which writes it anew"
        )
    return peak
