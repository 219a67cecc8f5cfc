"""How a DAS works: dispatch fragments to scorer actors, collect results, commit whole windows.

No clients here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayTaskError

from exfm_ray.das.pool import Completion, Pool
from exfm_ray.das.queue import FailedItem, OpenWindow, ScoreTask, WorkQueue
from exfm_ray.das.scorer import MAX_IN_FLIGHT, ScorerActor
from exfm_ray.das.snapshot_selector import SnapshotSelector
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.das.student_data_publisher import StudentDataPublisher
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import append_jsonl
from exfm_ray.storage.remote import StorageError, poll_interval
from exfm_ray.stores.snapshots import SnapshotError
from exfm_ray.stores.supervision import NotScoredError

TICK_S = 0.05
SCAN_S = 0.2
"""How often to look for new windows and snapshots; less often in a remote storage."""
SPEED_S = 30.0
"""The examples per second are those of so many seconds, or of fewer since the start."""
RECENT = 20
"""Faults and committed windows that `status` shows."""


@dataclass(frozen=True)
class CommittedWindow:
    """A window's supervision. Times are in seconds since the epoch.

    Attributes:
        window: index of the window.
        snapshot: version that scored it.
        examples: its number of examples.
        label_s: when the window ended.
        snapshot_s: when the snapshot was published.
        started_s: since when the window was waited for.
        dispatched_s: when an actor got its first fragment.
        ended_s: when it was committed.
    """

    window: int
    snapshot: int
    examples: int
    label_s: float
    snapshot_s: float
    started_s: float
    dispatched_s: float
    ended_s: float


class Scheduler:
    """Scores the requested windows, in order. Only `wait` may run beside other calls."""

    def __init__(self, spec: LabelingSpec, requested: Callable[[], Mapping[int, float]]) -> None:
        """Open the stream and prepare the pool.

        Args:
            spec: what is labeled.
            requested: returns window -> since when it is requested, in seconds since the epoch.
        """
        das = spec.das
        self._spec = spec
        self._requested = requested
        self._stream = EventStream.open(spec.stream_root)
        self._queue = WorkQueue(spec.failed_list, das.max_attempts)
        self._pool = Pool(
            lambda: ScorerActor.options(label_selector=spec.labels).remote(spec),
            das.min_actors,
            das.max_actors,
            das.max_concurrent_reloads,
        )
        self._selector = SnapshotSelector(spec.snapshots, spec.policy, das.max_attempts)
        self._publisher = StudentDataPublisher(spec, self._stream)

        self._committed: set[int] = set()
        self._rows: dict[int, int] = {}  # window -> rows scored
        self._throttled = ""  # why no further window is opened
        self._scanned_s = 0.0
        self._free_s = time.time()  # when the last window was opened or closed
        self._started_s = time.monotonic()
        self._recent_rows: deque[tuple[float, int]] = deque()
        self._recent_faults: deque[tuple[float, str]] = deque(maxlen=RECENT)
        self._recent_windows: deque[CommittedWindow] = deque(maxlen=RECENT)

    def dispatch(self) -> None:
        """Open windows and give their fragments to actors."""
        self._scan_when_due()
        self._pool.resize(self._queue.counts()["fragments"])
        self._submit_tasks()

    def wait(self) -> Sequence[Any]:
        """Wait a moment for results; return the Ray references that are ready."""
        return self._pool.wait(TICK_S)

    def collect(self, refs: Sequence[Any]) -> None:
        """Collect results, then commit the windows that are complete."""
        for completion in self._pool.collect(refs):
            self._handle(completion)
        for window in self._queue.finished():
            self._finish(window)

    def retry(self, windows: Iterable[int]) -> None:
        """Forget the faults of some windows and of all snapshots.

        It also forgets that the windows are committed: their files may have been removed since.
        """
        requested = set(windows)
        self._queue.forget_failures(requested)
        self._committed -= requested
        self._selector.forget_faults()
        self._scan_soon()

    def drop_unrequested(self) -> None:
        """Close the windows that no client requests any more."""
        for window in self._queue.open.keys() - self._requested().keys():
            self._queue.drop(window)

    def progress(self) -> dict[str, Any]:
        """Return the rows scored by window, the committed windows, and why windows have failed."""
        failed = {}
        for item in self._queue.failed_items:
            if item.window not in self._queue.open:
                failed[item.window] = item.cause
        return {"rows": dict(self._rows), "committed": set(self._committed), "failed": failed}

    def status(self) -> dict[str, Any]:
        """Return what `das status` shows about the work."""
        self._forget_old_rows()
        uptime_s = time.monotonic() - self._started_s
        seconds = min(SPEED_S, max(uptime_s, TICK_S))
        return {
            "backlog": self._backlog(),
            "committed": len(self._committed),
            "examples_per_s": sum(rows for _, rows in self._recent_rows) / seconds,
            "actors": [slot.status() for slot in self._pool.slots],
            "written": [asdict(window) for window in self._recent_windows],
            "throttled": self._throttled,
            "failed": [asdict(item) for item in self._queue.failed_items],
            "faults": list(self._recent_faults),
        }

    def _waited_since_s(self, window: int) -> float:
        """Return since when a window was waited for: requested, with no other one before it."""
        return max(self._free_s, self._requested().get(window, 0.0))

    def _scan_soon(self) -> None:
        self._scanned_s = 0.0

    def _scan_when_due(self) -> None:
        """Open windows if it is time to.

        If the storage is unavailable, try again later: a service that follows a stream outlives
        an outage.
        """
        interval = poll_interval(self._spec.stream_root, SCAN_S)
        if time.monotonic() - self._scanned_s < interval:
            return
        throttled_before = self._throttled
        try:
            self._open_ready_windows()
        except (StorageError, OSError) as error:
            self._throttled = one_line(error)
            if self._throttled != throttled_before:
                self._add_fault(self._throttled)
        self._scanned_s = time.monotonic()

    def _open_ready_windows(self) -> None:
        """Open requested windows in order until the actors have enough work."""
        self._throttled = ""
        das = self._spec.das
        enough = 2 * MAX_IN_FLIGHT * das.max_actors
        for window in self._unopened():
            if len(self._queue.waiting) >= enough or not self._stream.has(window):
                return
            has_teacher = self._spec.policy.version(window) is not None
            if not has_teacher or self._spec.has(window):
                self._committed.add(window)
            elif self._is_too_far_ahead(window):
                self._throttled = (
                    f"window {window} is das.max_windows_ahead = {das.max_windows_ahead} windows "
                    "ahead of the slowest reader"
                )
                return
            elif not self._open(window):
                return

    def _unopened(self) -> list[int]:
        """Return the requested windows that are neither open nor committed nor failed, in order."""
        handled = self._committed | self._queue.open.keys() | self._queue.failed_windows
        return sorted(self._requested().keys() - handled)

    def _open(self, window: int) -> bool:
        """Open a window; return False if its snapshot is still to come."""
        try:
            version = self._selector.choose(window)
            if version is None:
                planned = self._spec.policy.version(window)
                self._throttled = f"window {window} waits for snapshot {planned}"
                return False
            manifest = self._stream.window(window)
            self._queue.add(manifest, version, self._waited_since_s(window))
            self._free_s = time.time()
        except StorageError:  # tried again at the next scan
            raise
        except (UserError, OSError) as error:
            self._add_fault(f"window {window}: {error}")
            failed = FailedItem(
                window=window,
                fragment=None,
                snapshot=0,
                cause=str(error),
                tries=1,
                at_s=time.time(),
            )
            self._queue.add_failed(failed)
        return True

    def _is_too_far_ahead(self, window: int) -> bool:
        """Return True if the window has to wait for readers (das.max_windows_ahead)."""
        ahead = self._spec.das.max_windows_ahead
        if ahead is None or not self._spec.readers:
            return False
        windows_before = sum(other < window for other in self._stream.windows())
        learned = min(windows_learned(reader) for reader in self._spec.readers)
        return windows_before >= learned + ahead

    def _submit_tasks(self) -> None:
        refused: set[int] = set()  # versions for which no actor is free
        for task in self._queue.ready_tasks():
            if task.version in refused:
                continue
            if self._pool.submit(task):
                self._queue.mark_dispatched(task)
            elif task.isolate:  # leave the other tasks until an actor is free for it
                return
            else:
                refused.add(task.version)

    def _handle(self, completion: Completion) -> None:
        task = completion.task
        result = completion.result
        if result:
            self._recent_rows.append((time.time(), result.rows))
            self._rows[task.window] = self._rows.get(task.window, 0) + result.rows
        if not self._queue.is_current(task):
            return
        if result:
            self._queue.mark_done(task)
        elif isinstance(completion.error, SnapshotError):
            self._snapshot_failed(task, one_line(completion.error))
        else:
            self._task_failed(completion)

    def _task_failed(self, completion: Completion) -> None:
        task = completion.task
        cause = one_line(completion.error)
        if completion.died:
            cause = f"its actor died: {cause}"
            task.isolate = True
        self._add_fault(
            f"window {task.window}, {task.fragment.file}, snapshot {task.version}: {cause}"
        )
        self._queue.task_failed(task, cause, counts=not completion.other_tasks)

    def _snapshot_failed(self, task: ScoreTask, cause: str) -> None:
        """Try a snapshot again that could not be loaded, or leave it out.

        The windows that it was to score are then opened again with another one.
        """
        if not self._selector.failed(task.version, cause):
            self._queue.task_failed(task, cause, counts=False)
            return
        self._add_fault(f"snapshot {task.version} is left out: {cause}")
        for index, window in list(self._queue.open.items()):
            if window.version == task.version:
                self._queue.drop(index)
                self._scan_soon()

    def _finish(self, window: OpenWindow) -> None:
        """Commit and close a window whose fragments are all scored, or have failed.

        Whatever fails here is a failure of the window, not of the service.
        """
        index = window.manifest.index
        if not window.has_failures:
            try:
                if not self._is_complete(window):
                    return
                self._commit(window)
            except Exception as error:
                cause = one_line(error)
                self._add_fault(f"window {index}: {cause}")
                rescore = error.fragments if isinstance(error, NotScoredError) else ()
                if self._queue.window_failed(window, cause, rescore):
                    return
        self._queue.drop(index)
        self._free_s = time.time()
        self._scan_soon()

    def _is_complete(self, window: OpenWindow) -> bool:
        """Return True if no actor can write to the window and its student data is published."""
        if self._pool.has(window.manifest.index):
            return False
        return self._publisher.ensure_published(window, self._will_be_scored)

    def _will_be_scored(self, window: int) -> bool:
        """Return True if a window is still to be scored; raise a UserError if it has failed."""
        if window not in self._queue.open and window in self._queue.failed_windows:
            raise UserError(
                f"window {window + 1} is given each user's history up to window {window}, "
                "which has failed"
            )
        return window in self._requested() and window not in self._committed

    def _commit(self, window: OpenWindow) -> None:
        spec = self._spec
        manifest = window.manifest
        version = window.version
        tasks = spec.snapshots.tasks(version)
        published_s = spec.snapshots.published_s(version)
        spec.store.commit(manifest, version, tasks, spec.policy)
        self._committed.add(manifest.index)

        now = time.time()
        dispatched_s = window.dispatched_s or now
        committed = CommittedWindow(
            window=manifest.index,
            snapshot=version,
            examples=manifest.rows,
            label_s=manifest.end_ms / 1000,
            snapshot_s=published_s,
            started_s=min(window.requested_s, dispatched_s),
            dispatched_s=dispatched_s,
            ended_s=now,
        )
        self._recent_windows.append(committed)
        try:
            append_span(spec.log, spec.role, spec.store.teacher, committed)
            if spec.owns_snapshots:
                self._remove_old_snapshots()
        except Exception as error:  # the window stays committed
            self._add_fault(
                f"window {manifest.index} is committed, but what follows failed: {one_line(error)}"
            )

    def _remove_old_snapshots(self) -> None:
        windows = self._stream.windows()
        unfinished = [window for window in windows if not self._spec.has(window)]
        next_window = windows[-1] + 1
        self._selector.remove_unneeded(unfinished, next_window, self._spec.student_data)

    def _add_fault(self, message: str) -> None:
        self._recent_faults.append((time.time(), message))

    def _backlog(self) -> dict[str, int]:
        """Return how many windows, fragments and examples are requested and not done."""
        backlog = self._queue.counts()
        for window in self._unopened():
            has_teacher = self._spec.policy.version(window) is not None
            if self._stream.has(window) and has_teacher:
                manifest = self._stream.window(window)
                backlog["windows"] += 1
                backlog["fragments"] += len(manifest.fragments)
                backlog["examples"] += manifest.rows
        return backlog

    def _forget_old_rows(self) -> None:
        oldest_s = time.time() - SPEED_S
        while self._recent_rows and self._recent_rows[0][0] < oldest_s:
            self._recent_rows.popleft()


def append_span(
    log: Path,
    role: str,
    teacher: str,
    committed: CommittedWindow,
) -> None:
    """Append a committed window to the run's timeline (see docs/das.md)."""
    span = {
        "role": role,
        "window": committed.window,
        "phase": "score",
        "started_s": committed.started_s,
        "ended_s": committed.ended_s,
        "waited_s": committed.dispatched_s - committed.started_s,
        "examples": committed.examples,
        "snapshot": committed.snapshot,
        "teacher": teacher,
        "label_s": committed.label_s,
        "snapshot_s": committed.snapshot_s,
    }
    append_jsonl(log, [span])


def windows_learned(reader: Path) -> int:
    """Return how many windows a reader has learned, by the names of its checkpoints.

    These are `windows=<n>`, or inside the next window `windows=<n>.<more>`.
    """
    folders = [path.parent.name for path in reader.glob("windows=*/manifest.json")]
    names = [folder.removeprefix("windows=") for folder in folders]
    return max((int(name.partition(".")[0]) for name in names), default=0)


def one_line(error: BaseException | None) -> str:
    """Return the first line of an error's own message, without Ray's traceback around it."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, UserError):
        message = str(cause).strip()
    else:
        message = f"{type(cause).__name__}: {cause}"
    return message.splitlines()[0] if message else repr(cause)
