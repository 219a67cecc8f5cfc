"""What is left to score: windows that are open, their fragments that wait, and what has been
parked. No Ray here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from exfm_ray.data.stream import Fragment, Window
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import read_json, write_json
from exfm_ray.storage.remote import AnyPath, StorageError

RETRY_S = 0.2
"""Pause before the second try of a fragment or of a commit; it doubles with every further one, up
to `RETRY_MOST_S`."""
RETRY_MOST_S = 10.0


@dataclass(frozen=True)
class FailedItem:
    """What has failed too often; `fragment` None: the whole window, for want of a snapshot or
    because it could not be committed."""

    window: int
    fragment: str | None
    snapshot: int
    cause: str
    tries: int
    at_s: float


@dataclass
class ScoreTask:
    """A fragment to score with a version. `isolate`: its actor has died on it, or on one beside it,
    so it goes to an actor by itself. `given_s`: when an actor got it, by the monotonic clock."""

    window: int
    fragment: Fragment
    version: int
    tries: int = 0
    not_before: float = 0.0
    isolate: bool = False
    given_s: float = field(default_factory=time.monotonic)


@dataclass
class OpenWindow:
    """A window that is being scored. `begun_s`: when its first fragment was given to an actor.
    `tries`: of its commit, that have failed."""

    manifest: Window
    version: int
    asked_s: float
    begun_s: float | None = None
    left: set[str] = field(default_factory=set)
    parked: bool = False
    tries: int = 0
    not_before: float = 0.0

    def __post_init__(self) -> None:
        self.left = {fragment.file for fragment in self.manifest.fragments}


class WorkQueue:
    """Open windows in the order in which they were opened."""

    def __init__(self, path: AnyPath, tries: int) -> None:
        """`path`: where parked fragments are listed."""
        self._path = path
        self._tries = tries
        self.open: dict[int, OpenWindow] = {}
        self.waiting: deque[ScoreTask] = deque()
        self.failed_items = _read_parked(path)

    def add(
        self,
        window: Window,
        version: int,
        asked_s: float,
    ) -> None:
        """Open a window, or open it anew with another version."""
        self.drop(window.index)
        self.open[window.index] = OpenWindow(window, version, asked_s)
        self.waiting.extend(
            ScoreTask(window.index, fragment, version) for fragment in window.fragments
        )

    def drop(self, window: int) -> None:
        """Take a window out. What of it is with the actors is no longer wanted."""
        self.open.pop(window, None)
        self.waiting = deque(work for work in self.waiting if work.window != window)

    def ready_tasks(self) -> Iterator[ScoreTask]:
        """The works whose time has come, first windows first."""
        now = time.monotonic()
        return (work for work in list(self.waiting) if work.not_before <= now)

    def mark_dispatched(self, work: ScoreTask) -> None:
        """An actor has it in hand."""
        self.waiting.remove(work)
        opened = self.open[work.window]
        opened.begun_s = opened.begun_s or time.time()

    def is_current(self, work: ScoreTask) -> bool:
        """False for what came back after its window was dropped, or opened with another version."""
        opened = self.open.get(work.window)
        return (
            opened is not None
            and opened.version == work.version
            and work.fragment.file in opened.left
        )

    def done(self, work: ScoreTask) -> None:
        """Its supervision is on disk."""
        self.open[work.window].left.discard(work.fragment.file)

    def failed(
        self,
        work: ScoreTask,
        cause: str,
        blame: bool = True,
    ) -> None:
        """Try it again after a pause; after `tries` failures that are its own it is parked. Not
        `blame`: another's may have been to blame."""
        work.tries += blame
        if work.tries >= self._tries:
            self.park(
                FailedItem(
                    work.window, work.fragment.file, work.version, cause, work.tries, time.time()
                )
            )
            self.open[work.window].parked = True
            self.done(work)
            return
        work.not_before = time.monotonic() + _pause_s(work.tries)
        self.waiting.appendleft(work)

    def window_failed(
        self,
        window: OpenWindow,
        cause: str,
        again: Sequence[Fragment] = (),
    ) -> bool:
        """A window cannot be committed: it is tried again after a pause, these fragments scored
        before; False when it is parked, after `tries` failures."""
        index = window.manifest.index
        window.tries += 1
        if window.tries >= self._tries:
            self.park(FailedItem(index, None, window.version, cause, window.tries, time.time()))
            return False
        window.not_before = time.monotonic() + _pause_s(window.tries)
        window.left |= {fragment.file for fragment in again}
        self.waiting.extendleft(ScoreTask(index, fragment, window.version) for fragment in again)
        return True

    def finished(self) -> list[OpenWindow]:
        """Windows of which no fragment is left and whose time has come; those with parked ones,
        too."""
        now = time.monotonic()
        return [
            window for window in self.open.values() if not window.left and window.not_before <= now
        ]

    def park(self, parked: FailedItem) -> None:
        """List what has failed for good."""
        self.failed_items = [
            p
            for p in self.failed_items
            if (p.window, p.fragment) != (parked.window, parked.fragment)
        ] + [parked]
        self._write()

    def unpark(self, windows: set[int]) -> None:
        """Forget the failures of some windows: they are tried again."""
        if any(p.window in windows for p in self.failed_items):
            self.failed_items = [p for p in self.failed_items if p.window not in windows]
            self._write()

    def _write(self) -> None:
        with suppress(
            OSError, StorageError
        ):  # a full disk: the list is told by the service all the same
            write_json(self._path, [asdict(p) for p in self.failed_items])

    def counts(self) -> dict[str, Any]:
        """What is left of the open windows."""
        left = [
            fragment
            for w in self.open.values()
            for fragment in w.manifest.fragments
            if fragment.file in w.left
        ]
        return {
            "windows": len(self.open),
            "fragments": len(left),
            "examples": sum(fragment.rows for fragment in left),
        }


def _pause_s(tries: int) -> float:
    return min(RETRY_S * 2.0**tries, RETRY_MOST_S)


def _read_parked(path: AnyPath) -> list[FailedItem]:
    if not path.exists():
        return []
    try:
        return [FailedItem(**row) for row in read_json(path)]
    except TypeError as error:
        raise UserError(
            f"{path}: not a list of parked fragments ({error}); remove it, and what it lists is tried again"
        ) from None
