"""The pool of scorer actors.

It grows and shrinks with the backlog, replaces actors that die, and limits how many actors load
the next snapshot at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from exfm_ray.das.queue import ScoreTask
from exfm_ray.das.scorer import MAX_IN_FLIGHT, MAX_LOADED, ScoreResult

SHRINK_S = 20.0
"""An actor is ended after the backlog was too small for it for so long; a start takes seconds."""
START_TRIES = 3
CALL_TIMEOUT_S = 3600.0
"""Longest time for one fragment, with loading a snapshot; then the actor is killed."""


@dataclass
class ActorSlot:
    """One actor of the pool.

    Attributes:
        actor: handle of the actor.
        number: counts the actors that the pool has started, from 1.
        up: True once the actor's process runs.
        process: its process id, 0 before it runs.
        running: Ray reference -> the task that the actor has.
        loaded: versions that it has scored with, the latest last.
    """

    actor: Any
    number: int
    up: bool = False
    process: int = 0
    running: dict[Any, ScoreTask] = field(default_factory=dict)
    loaded: list[int] = field(default_factory=list)

    @property
    def oldest_task_age_s(self) -> float:
        """Seconds since the actor got the oldest of its tasks; 0 without tasks."""
        now = time.monotonic()
        dispatched = [task.dispatched_s for task in self.running.values()]
        return now - min(dispatched, default=now)

    @property
    def loading_versions(self) -> set[int]:
        """Versions that the actor has tasks for but has not scored with yet."""
        versions = {task.version for task in self.running.values()}
        return versions - set(self.loaded)

    @property
    def is_loading(self) -> bool:
        """True while the actor replaces a snapshot; the first one of a new actor does not count."""
        return bool(self.loaded and self.loading_versions)

    def must_reload_for(self, version: int) -> bool:
        """Return True if the actor would have to start replacing a snapshot for this version."""
        is_known = version in self.loaded or version in self.loading_versions
        return bool(self.loaded) and not is_known

    def status(self) -> dict[str, Any]:
        """Return what `das status` shows about the actor."""
        return {
            "number": self.number,
            "process": self.process,
            "up": self.up,
            "snapshots": list(self.loaded),
            "loading": sorted(self.loading_versions),
            "fragments": len(self.running),
        }

    def has_capacity(self, task: ScoreTask) -> bool:
        """Return True if the actor can take another task now."""
        if not self.up:
            return False
        is_isolated = any(other.isolate for other in self.running.values())
        if task.isolate or is_isolated:
            return not self.running
        return len(self.running) < MAX_IN_FLIGHT


@dataclass
class Completion:
    """The end of a task.

    Attributes:
        task: the task.
        result: what it took; None if it failed.
        error: why it failed; None if it succeeded.
        died: True if its actor died.
        other_tasks: how many other tasks the dead actor had.
    """

    task: ScoreTask
    result: ScoreResult | None = None
    error: BaseException | None = None
    died: bool = False
    other_tasks: int = 0


@dataclass
class Pool:
    """The scorer actors.

    Attributes:
        start: starts an actor and returns its handle.
        min_actors: the pool never has fewer actors.
        max_actors: the pool never has more actors.
        max_reloads: how many actors may load a next snapshot at once.
        slots: the actors.
    """

    start: Callable[[], Any]
    min_actors: int
    max_actors: int
    max_reloads: int
    slots: list[ActorSlot] = field(default_factory=list)
    _last_number: int = 0
    _busy_s: float = field(default_factory=time.monotonic)
    _starting: dict[Any, ActorSlot] = field(default_factory=dict)
    _failed_starts: int = 0

    def resize(self, fragments: int) -> None:
        """Adapt the number of actors to the number of fragments left, within the bounds.

        The pool grows at once, and shrinks by one actor after a while.
        """
        size = min(max(fragments, self.min_actors), self.max_actors)
        while len(self.slots) < size:
            self._start()

        now = time.monotonic()
        if len(self.slots) <= size:
            self._busy_s = now
        elif now - self._busy_s > SHRINK_S:
            idle = [slot for slot in self.slots if not slot.running]
            if idle:
                self._remove(idle[-1])
                ray.kill(idle[-1].actor)
            self._busy_s = now

    def _start(self) -> None:
        self._last_number += 1
        slot = ActorSlot(self.start(), self._last_number)
        self.slots.append(slot)
        self._starting[slot.actor.ready.remote()] = slot

    def _remove(self, slot: ActorSlot) -> None:
        self.slots = [other for other in self.slots if other is not slot]
        starting = self._starting.items()
        self._starting = {ref: other for ref, other in starting if other is not slot}

    def submit(self, task: ScoreTask) -> bool:
        """Give a task to the actor that has the fewest; return False if no actor can take it."""
        candidates = self._candidates(task)
        if not candidates:
            return False
        slot = min(candidates, key=lambda slot: len(slot.running))
        task.dispatched_s = time.monotonic()
        ref = slot.actor.score.remote(task.window, task.fragment, task.version)
        slot.running[ref] = task
        return True

    def _candidates(self, task: ScoreTask) -> list[ActorSlot]:
        """Return the actors that may take a task: those with its snapshot, if there are any."""
        version = task.version
        free = [slot for slot in self.slots if slot.has_capacity(task)]
        ready = [slot for slot in free if version in slot.loaded]
        if ready:
            return ready

        reloads = sum(slot.is_loading for slot in self.slots)
        if reloads < self.max_reloads:
            return free
        return [slot for slot in free if not slot.must_reload_for(version)]

    def has(self, window: int) -> bool:
        """Return True while an actor has a fragment of the window, of whatever version.

        Such an actor may still write.
        """
        for slot in self.slots:
            windows = {task.window for task in slot.running.values()}
            if window in windows:
                return True
        return False

    def wait(self, timeout_s: float) -> list[Any]:
        """Wait for a result and return the Ray references that are ready."""
        refs: list[Any] = []
        for slot in self.slots:
            refs += slot.running
        refs += self._starting
        if not refs:
            time.sleep(timeout_s)
            return []
        ray.wait(refs, timeout=timeout_s)
        ready: list[Any] = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        return ready

    def collect(self, ready: Sequence[Any]) -> list[Completion]:
        """Collect the tasks that have ended. Actors that died or do not answer are replaced."""
        slots: dict[Any, ActorSlot] = {}
        for slot in self.slots:
            slots |= dict.fromkeys(slot.running, slot)

        completions: list[Completion] = []
        for ref in ready:
            if ref in self._starting:
                self._started(ref)
            elif ref in slots and ref in slots[ref].running:
                completions += self._ended(slots[ref], ref)

        late = [slot for slot in self.slots if slot.oldest_task_age_s > CALL_TIMEOUT_S]
        for slot in late:
            error = TimeoutError(
                f"actor {slot.number} (process {slot.process}) has not answered for "
                f"{slot.oldest_task_age_s:.0f} s and was killed"
            )
            ray.kill(slot.actor)
            completions += self._replace(slot, error)
        return completions

    def _started(self, ref: Any) -> None:
        slot = self._starting.pop(ref)
        try:
            slot.process = ray.get(ref)
            slot.up = True
            self._failed_starts = 0
        except RayActorError:
            self._remove(slot)
            self._failed_starts += 1
            if self._failed_starts >= START_TRIES:
                raise
            self._start()

    def _ended(self, slot: ActorSlot, ref: Any) -> list[Completion]:
        try:
            result: ScoreResult = ray.get(ref)
        except RayTaskError as error:  # raised by the call; the actor lives
            return [Completion(slot.running.pop(ref), error=error)]
        except RayActorError as error:
            return self._replace(slot, error)
        except RayError as error:
            return [Completion(slot.running.pop(ref), error=error)]

        task = slot.running.pop(ref)
        if result.rows:  # otherwise the fragment was on disk, and the actor loaded no snapshot
            others = [version for version in slot.loaded if version != task.version]
            slot.loaded = [*others[1 - MAX_LOADED :], task.version]
        return [Completion(task, result)]

    def _replace(self, slot: ActorSlot, error: BaseException) -> list[Completion]:
        """Replace a dead actor and return its tasks, which have failed."""
        tasks = list(slot.running.values())
        self._remove(slot)
        self._start()
        other_tasks = len(tasks) - 1
        return [Completion(task, error=error, died=True, other_tasks=other_tasks) for task in tasks]

    def stop(self) -> None:
        """End all actors."""
        for slot in self.slots:
            ray.kill(slot.actor)
        self.slots = []
        self._starting = {}
