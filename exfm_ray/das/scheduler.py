"""How a DAS works: fragments are given to scorer actors, what comes back is collected, whole
windows are committed. No clients here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
LOOK_S = 0.2
"""How often the stream and the snapshots are looked at for what is new; less often where they are
remote."""
SPEED_S = 30.0
"""Examples per second are those of so many seconds, or of fewer since the start."""
RECENT = 20
"""Faults and windows that `told` tells of."""


@dataclass(frozen=True)
class CommittedWindow:
    """A window's supervision: when the window ended, its snapshot was published, itself begun and
    committed; seconds since the epoch."""

    window: int
    snapshot: int
    examples: int
    label_s: float
    snapshot_s: float
    started_s: float
    begun_s: float
    ended_s: float


class Scheduler:
    """Scores the windows that are wanted, in order. Calls must not come side by side, but for
    `wait`."""

    def __init__(self, order: LabelingSpec, wanted: Callable[[], Mapping[int, float]]) -> None:
        """`wanted`: window -> since when, in seconds since the epoch."""
        self._order = order
        self._wanted = wanted
        self._stream = EventStream.open(order.stream_root)
        das = order.das
        self._queue = WorkQueue(order.failed_list, das.max_attempts)
        self._pool = Pool(
            lambda: ScorerActor.options(label_selector=order.labels).remote(order),
            das.min_actors,
            das.max_actors,
            das.max_concurrent_reloads,
        )
        self._versions = SnapshotSelector(order.snapshots, order.policy, das.max_attempts)
        self._committed: set[int] = set()
        self._rows: dict[int, int] = {}
        self._recent: deque[tuple[float, int]] = deque()
        self._faults: deque[tuple[float, str]] = deque(maxlen=RECENT)
        self._written: deque[CommittedWindow] = deque(maxlen=RECENT)
        self._held_back = ""
        self._looked_s = 0.0
        self._free_s = time.time()
        self._giving = StudentDataPublisher(order, self._stream)
        self._started_s = time.monotonic()

    def dispatch(self) -> None:
        """Open windows and hand their fragments to actors."""
        self._look_again()
        self._pool.resize(self._queue.counts()["fragments"])
        self._give()

    def wait(self) -> Sequence[Any]:
        """What has come back, after waiting a moment for it; may run beside other calls."""
        return self._pool.wait(TICK_S)

    def collect(self, refs: Sequence[Any]) -> None:
        """Collect what came back, commit the windows that are whole."""
        for one in self._pool.collect(refs):
            self._take(one)
        for window in self._queue.finished():
            self._finish(window)

    def retry(self, windows: Iterable[int]) -> None:
        """Forget the faults of some windows and of all snapshots, and that the windows were done:
        they may have been removed since."""
        self._queue.unpark(set(windows))
        self._committed -= set(windows)
        self._versions.forget_faults()
        self._looked_s = 0.0

    def drop_unwanted(self) -> None:
        """Take out the windows that nobody wants any more."""
        for window in self._queue.open.keys() - self._wanted().keys():
            self._queue.drop(window)

    def progress(self) -> dict[str, Any]:
        """Window -> rows scored, the windows committed, and the causes for which windows are
        parked."""
        closed = {
            p.window: p.cause for p in self._queue.failed_items if p.window not in self._queue.open
        }
        return {"rows": dict(self._rows), "committed": set(self._committed), "parked": closed}

    def status(self) -> dict[str, Any]:
        """What `das status` shows of the work."""
        self._forget_old(time.time())
        seconds = min(SPEED_S, max(time.monotonic() - self._started_s, TICK_S))
        return {
            "backlog": self._left(),
            "committed": len(self._committed),
            "examples_per_s": sum(rows for _, rows in self._recent) / seconds,
            "actors": [member.status() for member in self._pool.members],
            "written": [asdict(written) for written in self._written],
            "held_back": self._held_back,
            "parked": [asdict(parked) for parked in self._queue.failed_items],
            "faults": list(self._faults),
        }

    def _asked_s(self, window: int) -> float:
        """Since when the window was waited for: it was asked for, and the one before it begun."""
        return max(self._free_s, self._wanted().get(window, 0.0))

    def _look_again(self) -> None:
        """Look, where it is time. A storage that cannot be used now is looked at again later:
        whoever follows a stream outlives that."""
        if time.monotonic() - self._looked_s < poll_interval(self._order.stream_root, LOOK_S):
            return
        before = self._held_back
        try:
            self._look()
        except (StorageError, OSError) as error:
            self._held_back = one_line(error)
            if self._held_back != before:
                self._fault(self._held_back)
        self._looked_s = time.monotonic()

    def _look(self) -> None:
        """Open the wanted windows that can be scored now, in order, as far as the actors have too
        little to do."""
        self._held_back = ""
        done = (
            self._committed | self._queue.open.keys() | {p.window for p in self._queue.failed_items}
        )
        enough = 2 * MAX_IN_FLIGHT * self._order.das.max_actors
        for window in sorted(self._wanted().keys() - done):
            if len(self._queue.waiting) >= enough or not self._stream.has(window):
                return
            if self._order.policy.version(window) is None or self._order.has(window):
                self._committed.add(window)
            elif self._too_far_ahead(window):
                self._held_back = f"window {window} is das.max_windows_ahead = {self._order.das.max_windows_ahead} windows ahead of the slowest reader"
                return
            elif not self._open(window):
                return

    def _open(self, window: int) -> bool:
        """False where its snapshot is still to come."""
        try:
            version = self._versions.choose(window)
            if version is None:
                self._held_back = (
                    f"window {window} waits for snapshot {self._order.policy.version(window)}"
                )
                return False
            self._queue.add(self._stream.window(window), version, self._asked_s(window))
            self._free_s = time.time()
        except StorageError:  # looked at again
            raise
        except (UserError, OSError) as error:
            self._fault(f"window {window}: {error}")
            self._queue.park(FailedItem(window, None, 0, str(error), 1, time.time()))
        return True

    def _too_far_ahead(self, window: int) -> bool:
        if self._order.das.max_windows_ahead is None or not self._order.readers:
            return False
        before = sum(other < window for other in self._stream.windows())
        return (
            before
            >= min(windows_learnt(reader) for reader in self._order.readers)
            + self._order.das.max_windows_ahead
        )

    def _give(self) -> None:
        refused: set[int] = set()
        for work in self._queue.ready_tasks():
            if work.version in refused:
                continue
            if self._pool.submit(work):
                self._queue.mark_dispatched(work)
            elif work.isolate:  # let an actor become free for it
                return
            else:
                refused.add(work.version)

    def _take(self, came: Completion) -> None:
        work = came.work
        if came.scored:
            self._recent.append((time.time(), came.scored.rows))
            self._rows[work.window] = self._rows.get(work.window, 0) + came.scored.rows
        if not self._queue.is_current(work):
            return
        if came.scored:
            self._queue.done(work)
        elif isinstance(came.error, SnapshotError):
            self._snapshot_failed(work, one_line(came.error))
        else:
            cause = f"its actor died: {one_line(came.error)}" if came.died else one_line(came.error)
            work.isolate = work.isolate or came.died
            self._fault(
                f"window {work.window}, {work.fragment.file}, snapshot {work.version}: {cause}"
            )
            self._queue.failed(work, cause, blame=not came.beside)

    def _snapshot_failed(self, work: ScoreTask, cause: str) -> None:
        """A snapshot that cannot be loaded: tried again, then left out; the windows that it was to
        score are opened anew."""
        if not self._versions.failed(work.version, cause):
            self._queue.failed(work, cause, blame=False)
            return
        self._fault(f"snapshot {work.version} is left out: {cause}")
        for window in [
            w.manifest.index for w in self._queue.open.values() if w.version == work.version
        ]:
            self._queue.drop(window)
            self._looked_s = 0.0

    def _finish(self, window: OpenWindow) -> None:
        """All its fragments are scored, or parked. Whatever fails now is a failure of this window,
        not of the service."""
        index = window.manifest.index
        if not window.parked:
            try:
                if self._pool.has(index) or not self._giving.ensure_published(
                    window, self._will_be_scored
                ):
                    return
                self._commit(window)
            except Exception as error:
                self._fault(f"window {index}: {one_line(error)}")
                again = error.fragments if isinstance(error, NotScoredError) else ()
                if self._queue.window_failed(window, one_line(error), again):
                    return
        self._queue.drop(index)
        self._free_s = time.time()
        self._looked_s = 0.0

    def _will_be_scored(self, window: int) -> bool:
        """Whether a window is still to be scored. UserError where it is parked."""
        if window not in self._queue.open and any(
            p.window == window for p in self._queue.failed_items
        ):
            raise UserError(
                f"window {window + 1} is given each user's history up to window {window}, which is parked"
            )
        return window in self._wanted() and window not in self._committed

    def _commit(self, window: OpenWindow) -> None:
        order = self._order
        manifest = window.manifest
        version = window.version
        tasks = order.snapshots.tasks(version)
        published_s = order.snapshots.published_s(version)
        order.store.commit(manifest, version, tasks, order.policy)
        self._committed.add(manifest.index)
        now = time.time()
        begun_s = window.begun_s or now
        written = CommittedWindow(
            manifest.index,
            version,
            manifest.rows,
            manifest.end_ms / 1000,
            published_s,
            min(window.asked_s, begun_s),
            begun_s,
            now,
        )
        self._written.append(written)
        try:
            self._log(written)
            if order.owns_snapshots:
                there = self._stream.windows()
                self._versions.remove_unneeded(
                    (w for w in there if not order.has(w)), there[-1] + 1, order.gifts
                )
        except Exception as error:  # the window is committed all the same
            self._fault(
                f"window {manifest.index} is committed, but what follows failed: {one_line(error)}"
            )

    def _log(self, written: CommittedWindow) -> None:
        span = {
            "role": self._order.role,
            "window": written.window,
            "phase": "score",
            "started_s": written.started_s,
            "ended_s": written.ended_s,
        }
        span |= {
            "waited_s": written.begun_s - written.started_s,
            "examples": written.examples,
            "snapshot": written.snapshot,
        }
        span |= {
            "teacher": self._order.store.teacher,
            "label_s": written.label_s,
            "snapshot_s": written.snapshot_s,
        }
        append_jsonl(self._order.log, [span])

    def _fault(self, told: str) -> None:
        self._faults.append((time.time(), told))

    def _left(self) -> dict[str, int]:
        """Windows, fragments and examples that are wanted and not done, open or not."""
        done = (
            self._committed | {p.window for p in self._queue.failed_items} | self._queue.open.keys()
        )
        counts = self._queue.counts()
        for window in self._wanted().keys() - done:
            if self._stream.has(window) and self._order.policy.version(window) is not None:
                manifest = self._stream.window(window)
                more = {
                    "windows": 1,
                    "fragments": len(manifest.fragments),
                    "examples": manifest.rows,
                }
                counts = {key: counts[key] + more[key] for key in counts}
        return counts

    def _forget_old(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - SPEED_S:
            self._recent.popleft()


def windows_learnt(reader: Any) -> int:
    """How many windows a reader has learnt, from its folder of checkpoints: `windows=<n>`, or
    inside the next one `windows=<n>.<more>`."""
    names = (
        path.parent.name.removeprefix("windows=") for path in reader.glob("windows=*/manifest.json")
    )
    return max((int(name.partition(".")[0]) for name in names), default=0)


def one_line(error: BaseException | None) -> str:
    """An error as its own words, without Ray's traceback around it."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    told = (
        str(cause).strip() if isinstance(cause, UserError) else f"{type(cause).__name__}: {cause}"
    )
    return told.splitlines()[0] if told else repr(cause)
