"""What is left to score: open windows, their waiting fragments, and what has failed for good.

No Ray here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from exfm_ray.data.stream import Fragment, Window
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import read_json, write_json
from exfm_ray.storage.remote import AnyPath, StorageError

RETRY_S = 0.2
"""Pause before the second attempt at a fragment or a commit; it doubles with every further one."""
MAX_RETRY_S = 10.0


@dataclass(frozen=True)
class FailedItem:
    """What has failed for good. The fields are those of the list on disk.

    Attributes:
        window: index of the window.
        fragment: file name of the fragment. None for the whole window, which had no snapshot or
            could not be committed.
        snapshot: version that was to score it.
        cause: the last error.
        tries: number of failed attempts.
        at_s: when it failed for good, in seconds since the epoch.
    """

    window: int
    fragment: str | None
    snapshot: int
    cause: str
    tries: int
    at_s: float


@dataclass
class ScoreTask:
    """A fragment to score with a version.

    Attributes:
        window: index of the window.
        fragment: the fragment.
        version: the snapshot to score with.
        tries: failed attempts that count.
        not_before: earliest time of the next attempt, by the monotonic clock.
        isolate: True gives it an actor without other tasks. Its last actor died, maybe because of
            this fragment, maybe because of one beside it.
        dispatched_s: when an actor got it, by the monotonic clock.
    """

    window: int
    fragment: Fragment
    version: int
    tries: int = 0
    not_before: float = 0.0
    isolate: bool = False
    dispatched_s: float = field(default_factory=time.monotonic)


@dataclass
class OpenWindow:
    """A window that is being scored.

    Attributes:
        manifest: the window.
        version: the snapshot that scores it.
        requested_s: since when it was waited for, in seconds since the epoch.
        dispatched_s: when an actor got its first fragment, in seconds since the epoch.
        left: file names of the fragments that are not scored yet.
        has_failures: True if a fragment has failed for good.
        tries: failed attempts to commit it.
        not_before: earliest time of the next attempt, by the monotonic clock.
    """

    manifest: Window
    version: int
    requested_s: float
    dispatched_s: float | None = None
    left: set[str] = field(default_factory=set)
    has_failures: bool = False
    tries: int = 0
    not_before: float = 0.0

    def __post_init__(self) -> None:
        self.left = {fragment.file for fragment in self.manifest.fragments}


class WorkQueue:
    """Open windows, in the order in which they were opened.

    Attributes:
        open: window -> its state.
        waiting: tasks that no actor has.
        failed_items: what has failed for good.
    """

    def __init__(self, failed_list: AnyPath, max_attempts: int) -> None:
        """Read what has failed for good before.

        Args:
            failed_list: the file that lists it.
            max_attempts: a fragment or commit that failed so often has failed for good.
        """
        self._failed_list = failed_list
        self._max_attempts = max_attempts
        self.open: dict[int, OpenWindow] = {}
        self.waiting: deque[ScoreTask] = deque()
        self.failed_items = _read_failed_list(failed_list)

    @property
    def failed_windows(self) -> set[int]:
        """Windows with something that has failed for good."""
        return {item.window for item in self.failed_items}

    def add(
        self,
        window: Window,
        version: int,
        requested_s: float,
    ) -> None:
        """Open a window, or open it again with another version."""
        self.drop(window.index)
        self.open[window.index] = OpenWindow(window, version, requested_s)
        for fragment in window.fragments:
            self.waiting.append(ScoreTask(window.index, fragment, version))

    def drop(self, window: int) -> None:
        """Close a window. What the actors have of it is ignored when it comes back."""
        self.open.pop(window, None)
        self.waiting = deque(task for task in self.waiting if task.window != window)

    def ready_tasks(self) -> list[ScoreTask]:
        """Return the tasks that may be dispatched now, first windows first."""
        now = time.monotonic()
        return [task for task in self.waiting if task.not_before <= now]

    def mark_dispatched(self, task: ScoreTask) -> None:
        """Note that an actor has a task."""
        self.waiting.remove(task)
        window = self.open[task.window]
        window.dispatched_s = window.dispatched_s or time.time()

    def is_current(self, task: ScoreTask) -> bool:
        """Return False if the task's window was closed, or opened with another version, since."""
        window = self.open.get(task.window)
        if window is None or window.version != task.version:
            return False
        return task.fragment.file in window.left

    def mark_done(self, task: ScoreTask) -> None:
        """Note that a fragment's supervision is on disk."""
        self.open[task.window].left.discard(task.fragment.file)

    def task_failed(
        self,
        task: ScoreTask,
        cause: str,
        counts: bool = True,
    ) -> None:
        """Try a task again after a pause, or give it up after too many failures.

        Args:
            task: the task.
            cause: the error.
            counts: False if another task may be to blame.
        """
        task.tries += counts
        if task.tries >= self._max_attempts:
            self.add_failed(
                FailedItem(
                    window=task.window,
                    fragment=task.fragment.file,
                    snapshot=task.version,
                    cause=cause,
                    tries=task.tries,
                    at_s=time.time(),
                )
            )
            self.open[task.window].has_failures = True
            self.mark_done(task)
            return
        task.not_before = time.monotonic() + _pause_s(task.tries)
        self.waiting.appendleft(task)

    def window_failed(
        self,
        window: OpenWindow,
        cause: str,
        rescore: Sequence[Fragment] = (),
    ) -> bool:
        """Try to commit a window again after a pause, or give it up after too many failures.

        Args:
            window: the window.
            cause: the error.
            rescore: fragments to score again before.

        Returns:
            False if the window has failed for good.
        """
        index = window.manifest.index
        window.tries += 1
        if window.tries >= self._max_attempts:
            self.add_failed(
                FailedItem(
                    window=index,
                    fragment=None,
                    snapshot=window.version,
                    cause=cause,
                    tries=window.tries,
                    at_s=time.time(),
                )
            )
            return False
        window.not_before = time.monotonic() + _pause_s(window.tries)
        for fragment in rescore:
            window.left.add(fragment.file)
            self.waiting.appendleft(ScoreTask(index, fragment, window.version))
        return True

    def finished(self) -> list[OpenWindow]:
        """Return the windows without fragments left, also those with failures, that are due."""
        now = time.monotonic()
        windows = self.open.values()
        return [window for window in windows if not window.left and window.not_before <= now]

    def add_failed(self, failed: FailedItem) -> None:
        """List what has failed for good, in place of an earlier failure of the same item."""
        key = (failed.window, failed.fragment)
        others = [item for item in self.failed_items if (item.window, item.fragment) != key]
        self.failed_items = [*others, failed]
        self._write_failed_list()

    def forget_failures(self, windows: set[int]) -> None:
        """Forget the failures of some windows, so that they are tried again."""
        if self.failed_windows & windows:
            others = [item for item in self.failed_items if item.window not in windows]
            self.failed_items = others
            self._write_failed_list()

    def _write_failed_list(self) -> None:
        rows = [asdict(item) for item in self.failed_items]
        with suppress(OSError, StorageError):  # on a full disk the service's status still has it
            write_json(self._failed_list, rows)

    def counts(self) -> dict[str, int]:
        """Return how much of the open windows is left."""
        left: list[Fragment] = []
        for window in self.open.values():
            left += [f for f in window.manifest.fragments if f.file in window.left]
        return {
            "windows": len(self.open),
            "fragments": len(left),
            "examples": sum(fragment.rows for fragment in left),
        }


def _pause_s(tries: int) -> float:
    return min(RETRY_S * 2.0**tries, MAX_RETRY_S)


def _read_failed_list(path: AnyPath) -> list[FailedItem]:
    if not path.exists():
        return []
    try:
        return [FailedItem(**row) for row in read_json(path)]
    except TypeError as error:
        raise UserError(
            f"{path}: not a list of failed fragments ({error}); remove it, and what it lists is "
            "tried again"
        ) from None
