"""The pool of scorer actors: grows and shrinks with the backlog, outlives the death of an actor,
rolls over a few at a time."""

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
"""An actor is given up when the backlog has been too small for it for so long; to start one takes
seconds."""
START_TRIES = 3
CALL_S = 3600.0
"""Longest that an actor may take for a fragment, a snapshot's loading included; then it is
killed."""


@dataclass
class ActorSlot:
    """An actor: not `up` before its process runs. `held`: the versions that it has scored with, the
    latest last."""

    actor: Any
    number: int
    up: bool = False
    process: int = 0
    running: dict[Any, ScoreTask] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)

    @property
    def oldest_task_age_s(self) -> float:
        """For how long its oldest fragment is in hand."""
        now = time.monotonic()
        return now - min((work.given_s for work in self.running.values()), default=now)

    @property
    def loading_versions(self) -> set[int]:
        """Versions that it takes up now."""
        return {work.version for work in self.running.values()} - set(self.held)

    @property
    def is_loading(self) -> bool:
        """True while it exchanges a snapshot that it holds for another; a fresh actor takes up its
        first without holding up any other."""
        return bool(self.held and self.loading_versions)

    def status(self) -> dict[str, Any]:
        """What `das status` shows of it."""
        return {
            "number": self.number,
            "process": self.process,
            "up": self.up,
            "snapshots": list(self.held),
            "coming": sorted(self.loading_versions),
            "fragments": len(self.running),
        }

    def has_capacity(self, work: ScoreTask) -> bool:
        """Whether it can have one more."""
        if work.isolate or any(other.isolate for other in self.running.values()):
            return self.up and not self.running
        return self.up and len(self.running) < MAX_IN_FLIGHT


@dataclass
class Completion:
    """What came back for a work: what it took, or the error. `died`: its actor did, `beside` so
    many other works."""

    work: ScoreTask
    scored: ScoreResult | None = None
    error: BaseException | None = None
    died: bool = False
    beside: int = 0


@dataclass
class Pool:
    """`min_actors` to `max_actors` actors that `start` makes; at most `rollover` of them load a
    next snapshot at once."""

    start: Callable[[], Any]
    min_actors: int
    max_actors: int
    rollover: int
    members: list[ActorSlot] = field(default_factory=list)
    _number: int = 0
    _enough_since: float = field(default_factory=time.monotonic)
    _starting: dict[Any, ActorSlot] = field(default_factory=dict)
    _failed_starts: int = 0

    def resize(self, fragments: int) -> None:
        """An actor for each fragment that is left, within the bounds: grows at once, shrinks by one
        after a while."""
        wanted = min(max(fragments, self.min_actors), self.max_actors)
        while len(self.members) < wanted:
            self._start()
        if len(self.members) <= wanted:
            self._enough_since = time.monotonic()
        elif time.monotonic() - self._enough_since > SHRINK_S:
            idle = [member for member in self.members if not member.running]
            for member in idle[-1:]:
                self._remove(member)
                ray.kill(member.actor)
            self._enough_since = time.monotonic()

    def _start(self) -> None:
        self._number += 1
        member = ActorSlot(self.start(), self._number)
        self.members.append(member)
        self._starting[member.actor.ready.remote()] = member

    def _remove(self, member: ActorSlot) -> None:
        self.members = [other for other in self.members if other is not member]
        self._starting = {
            ref: other for ref, other in self._starting.items() if other is not member
        }

    def submit(self, work: ScoreTask) -> bool:
        """Hand a work to the actor that has least in hand; False when none can have it now."""
        free = [member for member in self.members if member.has_capacity(work)]
        fit = [member for member in free if work.version in member.held]
        if not fit and sum(member.is_loading for member in self.members) < self.rollover:
            fit = free
        fit = fit or [
            member for member in free if not member.held or work.version in member.loading_versions
        ]
        if not fit:
            return False
        member = min(fit, key=lambda member: len(member.running))
        work.given_s = time.monotonic()
        member.running[member.actor.score.remote(work.window, work.fragment, work.version)] = work
        return True

    def has(self, window: int) -> bool:
        """True while an actor has a fragment of a window in hand, be it by a version that is no
        longer wanted: it may still write."""
        return any(
            work.window == window for member in self.members for work in member.running.values()
        )

    def wait(self, timeout_s: float) -> list[Any]:
        """References that are ready, after waiting for the first."""
        refs = [*(ref for member in self.members for ref in member.running), *self._starting]
        if not refs:
            time.sleep(timeout_s)
            return []
        ray.wait(refs, timeout=timeout_s)
        ready: list[Any] = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        return ready

    def collect(self, ready: Sequence[Any]) -> list[Completion]:
        """What has come back by these references; an actor that has died, or does not answer, is
        replaced."""
        running = {ref: member for member in self.members for ref in member.running}
        came: list[Completion] = []
        for ref in ready:
            if ref in self._starting:
                self._started(ref)
            elif ref in running and ref in running[ref].running:
                came += self._returned(running[ref], ref)
        for member in [member for member in self.members if member.oldest_task_age_s > CALL_S]:
            told = f"actor {member.number} (process {member.process}) has not answered for {member.oldest_task_age_s:.0f} s and was killed"
            ray.kill(member.actor)
            came += self._lost(member, TimeoutError(told))
        return came

    def _started(self, ref: Any) -> None:
        member = self._starting.pop(ref)
        try:
            member.process = ray.get(ref)
            member.up = True
            self._failed_starts = 0
        except RayActorError:
            self._remove(member)
            self._failed_starts += 1
            if self._failed_starts >= START_TRIES:
                raise
            self._start()

    def _returned(self, member: ActorSlot, ref: Any) -> list[Completion]:
        try:
            scored: ScoreResult = ray.get(ref)
        except RayError as error:
            if isinstance(error, RayTaskError) or not isinstance(
                error, RayActorError
            ):  # raised by the call; the actor lives
                return [Completion(member.running.pop(ref), error=error)]
            return self._lost(member, error)
        work = member.running.pop(ref)
        if scored.rows:  # otherwise it was on disk, and no snapshot was taken up
            others = [version for version in member.held if version != work.version]
            member.held = [*others[1 - MAX_LOADED :], work.version]
        return [Completion(work, scored)]

    def _lost(self, member: ActorSlot, error: BaseException) -> list[Completion]:
        """Replace an actor; what it had in hand."""
        lost = list(member.running.values())
        self._remove(member)
        self._start()
        return [Completion(work, error=error, died=True, beside=len(lost) - 1) for work in lost]

    def stop(self) -> None:
        """End all actors."""
        for member in self.members:
            ray.kill(member.actor)
        self.members = []
        self._starting = {}
