"""The DAS as a service: an actor that labels a stream's windows by one teacher for all who ask, with a pool of scorer actors.

Everything that lasts lies on disk: the supervision, and the list of what is parked. So the service can be killed at any moment;
whoever asks starts it again, and it scores what is missing.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from exfm_ray.das.backlog import Backlog, OpenWindow, Parked, Work
from exfm_ray.das.order import Order
from exfm_ray.das.pool import Came, Pool
from exfm_ray.das.scorer import CALLS, ScorerActor
from exfm_ray.das.snapshots import SnapshotError
from exfm_ray.das.versions import Versions
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.files import append_lines

TICK_S = 0.05
LOOK_S = 0.2
"""How often the stream and the snapshots are looked at for what is new."""
SPEED_S = 30.0
"""Examples per second are those of so many seconds."""
OWN = "own"
"""The client that stands for what a lasting service does by itself."""
KEPT = 20
"""Faults and windows that `state` tells of."""


@dataclass(frozen=True)
class Written:
    """A window's supervision: when its last event was, its snapshot published, itself begun and committed; seconds since the epoch."""

    window: int
    snapshot: int
    examples: int
    label_s: float
    snapshot_s: float
    started_s: float
    begun_s: float
    ended_s: float


class Service:
    """Scores what its clients ask for. A `lasting` one scores all windows of the stream and stays when its clients have left; with `follow`
    those that appear later, too."""

    def __init__(self, order: Order, lasting: bool = False, follow: bool = False) -> None:
        self._order, self._lasting, self._follow = order, lasting, follow
        self._stream = EventStream.open(order.stream_root)
        das = order.das
        self._backlog = Backlog(order.store.root / order.store.teacher / "parked.json", das.tries)
        self._pool = Pool(lambda: ScorerActor.options(label_selector=order.labels).remote(order), das.min_actors, das.max_actors, das.rollover)
        self._versions = Versions(order.snapshots, order.policy, das.tries)
        self._asked: dict[str, dict[int, float]] = {}
        self._committed: set[int] = set()
        self._rows: dict[int, int] = {}
        self._recent: deque[tuple[float, int]] = deque()
        self._faults: deque[tuple[float, str]] = deque(maxlen=KEPT)
        self._written: deque[Written] = deque(maxlen=KEPT)
        self._held_back, self._looked_s, self._free_s, self._error = "", 0.0, time.time(), ""
        self._beside = ThreadPoolExecutor(1, "gifts")  # histories are made in order
        self._giving: dict[int, Future[None]] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        if lasting:
            self.ask(OWN, self._stream.windows())
        threading.Thread(target=self._run, daemon=True, name="das").start()

    # What clients call.

    def order(self) -> tuple[Order, bool]:
        """What it carries out, and whether it is lasting."""
        return self._order, self._lasting

    def ask(self, client: str, windows: Iterable[int]) -> None:
        """Score these windows; what of them is parked is tried again."""
        with self._lock:
            now = time.time()
            self._asked.setdefault(client, {}).update(dict.fromkeys(windows, now))
            self._backlog.unpark(set(windows))
            self._committed -= set(windows)  # their supervision may have been removed since
            self._versions.forget_faults()
            self._looked_s = 0.0

    def follow(self, follow: bool) -> None:
        """Score all windows that are there; what is parked is tried again. With `follow` later ones, too."""
        self._follow = follow or self._follow
        self.ask(OWN, self._stream.windows())

    def leave(self, client: str) -> bool:
        """A client wants nothing more; True when the service is needed no longer."""
        with self._lock:
            self._asked.pop(client, None)
            for window in self._backlog.open.keys() - self._wanted():
                self._backlog.drop(window)
            return not self._asked

    def progress(self, client: str) -> dict[str, Any] | None:
        """Window -> rows scored by this process, the windows committed, and the causes for which windows are parked. None for a client
        that has not asked: this process may have been started after another one was killed."""
        with self._lock:
            if self._error:
                raise RuntimeError(f"the DAS has failed:\n{self._error}")
            if client not in self._asked:
                return None
            closed = {p.window: p.cause for p in self._backlog.parked if p.window not in self._backlog.open}
            return {"rows": dict(self._rows), "committed": set(self._committed), "parked": closed}

    def state(self) -> dict[str, Any]:
        """All that `das status` shows."""
        with self._lock:
            now = time.time()
            self._forget_old(now)
            return {
                "name": self._order.name, "teacher": self._order.store.teacher, "store": str(self._order.store.root),
                "clients": len(self._asked.keys() - {OWN}), "lasting": self._lasting, "follow": self._follow,
                "backlog": self._left(), "committed": len(self._committed),
                "examples_per_s": sum(rows for _, rows in self._recent) / SPEED_S,
                "actors": [member.told() for member in self._pool.members],
                "written": [asdict(written) for written in self._written], "held_back": self._held_back,
                "parked": [asdict(parked) for parked in self._backlog.parked], "faults": list(self._faults), "error": self._error,
            }  # fmt: skip

    def close(self) -> None:
        """Do nothing more."""
        self._over.set()

    # The one thread that works.

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                with self._lock:
                    self._look()
                    self._pool.resize(self._backlog.counts()["fragments"])
                    self._give()
                refs = self._pool.wait(TICK_S)
                with self._lock:
                    for one in self._pool.collect(refs):
                        self._take(one)
                    for window in self._backlog.finished():
                        self._finish(window)
        except BaseException:  # a thread's error must reach the clients, whatever it is
            self._error = traceback.format_exc()

    def _wanted(self) -> set[int]:
        asked = {window for windows in self._asked.values() for window in windows}
        return asked | (set(self._stream.windows()) if self._follow else set())

    def _asked_s(self, window: int) -> float:
        """Since when the window was waited for: it was asked for, and the one before it begun."""
        return max(self._free_s, min((windows[window] for windows in self._asked.values() if window in windows), default=0.0))

    def _look(self) -> None:
        """Open the wanted windows that can be scored now, in order, as far as the actors have too little to do."""
        if time.monotonic() - self._looked_s < LOOK_S:
            return
        self._looked_s, self._held_back = time.monotonic(), ""
        done = self._committed | self._backlog.open.keys() | {p.window for p in self._backlog.parked}
        enough = 2 * CALLS * self._order.das.max_actors
        for window in sorted(self._wanted() - done):
            if len(self._backlog.waiting) >= enough or not self._stream.has(window):
                return
            if self._order.policy.version(window) is None or self._order.has(window):
                self._committed.add(window)
            elif self._too_far_ahead(window):
                self._held_back = f"window {window} is das.ahead = {self._order.das.ahead} windows ahead of the slowest reader"
                return
            elif not self._open(window):
                return

    def _open(self, window: int) -> bool:
        """False where its snapshot is still to come."""
        try:
            version = self._versions.choose(window)
            if version is None:
                self._held_back = f"window {window} waits for snapshot {self._order.policy.version(window)}"
                return False
            self._backlog.add(self._stream.window(window), version, self._asked_s(window))
            self._free_s = time.time()
        except (UserError, OSError) as error:
            self._park(window, 0, str(error))
        return True

    def _too_far_ahead(self, window: int) -> bool:
        if self._order.das.ahead is None or not self._order.readers:
            return False
        before = sum(other < window for other in self._stream.windows())
        return before >= min(windows_learnt(reader) for reader in self._order.readers) + self._order.das.ahead

    def _give(self) -> None:
        refused: set[int] = set()
        for work in self._backlog.due():
            if work.version in refused:
                continue
            if self._pool.give(work):
                self._backlog.given(work)
            elif work.alone:  # let an actor become free for it
                return
            else:
                refused.add(work.version)

    def _take(self, came: Came) -> None:
        work = came.work
        if came.scored:
            self._recent.append((time.time(), came.scored.rows))
            self._rows[work.window] = self._rows.get(work.window, 0) + came.scored.rows
        if not self._backlog.wanted(work):
            return
        if came.scored:
            self._backlog.done(work)
        elif isinstance(came.error, SnapshotError):
            self._snapshot_failed(work, plain(came.error))
        else:
            cause = f"its actor died: {plain(came.error)}" if came.died else plain(came.error)
            work.alone = work.alone or came.died
            self._fault(f"window {work.window}, {work.fragment.file}, snapshot {work.version}: {cause}")
            self._backlog.failed(work, cause, blame=not came.beside)

    def _snapshot_failed(self, work: Work, cause: str) -> None:
        """A snapshot that cannot be loaded: tried again, then left out; the windows that it was to score are opened anew."""
        if not self._versions.failed(work.version, cause):
            self._backlog.failed(work, cause, blame=False)
            return
        self._fault(f"snapshot {work.version} is left out: {cause}")
        for window in [w.manifest.index for w in self._backlog.open.values() if w.version == work.version]:
            self._backlog.drop(window)
            self._looked_s = 0.0

    def _finish(self, window: OpenWindow) -> None:
        """All its fragments are scored, or parked."""
        if not window.parked:
            try:
                if not self._gave(window):
                    return
                self._commit(window)
            except (UserError, OSError) as error:
                self._park(window.manifest.index, window.version, plain(error))
        self._backlog.drop(window.manifest.index)
        self._free_s, self._looked_s = time.time(), 0.0

    def _gave(self, window: OpenWindow) -> bool:
        """True when students have what they are given beside predictions; otherwise it is being made, beside the scoring."""
        gifts, index = self._order.gifts, window.manifest.index
        if gifts is None or gifts.has(index):
            self._giving.pop(index, None)
            return True
        if index in self._giving:
            if self._giving[index].done():
                self._giving.pop(index).result()
        elif gifts.ready(index) or index - 1 not in self._backlog.open:
            self._giving[index] = self._beside.submit(gifts.publish, self._stream, self._order.snapshots, window.manifest, window.version)
        return False

    def _commit(self, window: OpenWindow) -> None:
        order, manifest, version = self._order, window.manifest, window.version
        tasks, published_s = order.snapshots.tasks(version), order.snapshots.published_s(version)
        order.store.commit(manifest, version, tasks, order.policy)
        self._committed.add(manifest.index)
        now = time.time()
        begun_s = window.begun_s or now
        written = Written(manifest.index, version, manifest.rows, manifest.end_ms / 1000, published_s, min(window.asked_s, begun_s), begun_s, now)
        self._written.append(written)
        span = {"role": order.role, "window": written.window, "phase": "score", "started_s": written.started_s, "ended_s": now}
        span |= {"waited_s": begun_s - written.started_s, "examples": written.examples, "snapshot": version}
        append_lines(order.log, [span | {"teacher": order.store.teacher, "label_s": written.label_s, "snapshot_s": published_s}])
        if order.owns_snapshots:
            there = self._stream.windows()
            self._versions.remove_unneeded((w for w in there if not order.has(w)), there[-1] + 1)

    def _park(self, window: int, snapshot: int, cause: str) -> None:
        self._fault(f"window {window}: {cause}")
        self._backlog.park(Parked(window, None, snapshot, cause, 1, time.time()))

    def _fault(self, told: str) -> None:
        self._faults.append((time.time(), told))

    def _left(self) -> dict[str, int]:
        """Windows, fragments and examples that are wanted and not done, open or not."""
        done = self._committed | {p.window for p in self._backlog.parked} | self._backlog.open.keys()
        counts = self._backlog.counts()
        for window in self._wanted() - done:
            if self._stream.has(window) and self._order.policy.version(window) is not None:
                manifest = self._stream.window(window)
                more = {"windows": 1, "fragments": len(manifest.fragments), "examples": manifest.rows}
                counts = {key: counts[key] + more[key] for key in counts}
        return counts

    def _forget_old(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - SPEED_S:
            self._recent.popleft()


def windows_learnt(reader: Any) -> int:
    """How many windows a reader has learnt, from its folder of checkpoints: `windows=<n>`, or inside the next one `windows=<n>.<more>`."""
    names = (path.parent.name.removeprefix("windows=") for path in reader.glob("windows=*/manifest.json"))
    return max((int(name.partition(".")[0]) for name in names), default=0)


def plain(error: BaseException | None) -> str:
    """An error as its own words, without Ray's traceback around it."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    told = str(cause).strip() if isinstance(cause, UserError) else f"{type(cause).__name__}: {cause}"
    return told.splitlines()[0] if told else repr(cause)


ServiceActor = ray.remote(num_cpus=0, max_concurrency=16, max_restarts=-1)(Service)
