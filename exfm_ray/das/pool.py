"""The pool of scorer actors: grows and shrinks with the backlog, outlives the death of an actor, rolls over a few at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from exfm_ray.das.queue import Work
from exfm_ray.das.scorer import CALLS, VERSIONS, Scored

SHRINK_S = 20.0
"""An actor is given up when the backlog has been too small for it for so long; to start one takes seconds."""
START_TRIES = 3
CALL_S = 3600.0
"""Longest that an actor may take for a fragment, a snapshot's loading included; then it is killed."""


@dataclass
class Member:
    """An actor: not `up` before its process runs. `held`: the versions that it has scored with, the latest last."""

    actor: Any
    number: int
    up: bool = False
    process: int = 0
    running: dict[Any, Work] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)

    @property
    def silent_s(self) -> float:
        """For how long its oldest fragment is in hand."""
        now = time.monotonic()
        return now - min((work.given_s for work in self.running.values()), default=now)

    @property
    def coming(self) -> set[int]:
        """Versions that it takes up now."""
        return {work.version for work in self.running.values()} - set(self.held)

    @property
    def loading(self) -> bool:
        """True while it exchanges a snapshot that it holds for another; a fresh actor takes up its first without holding up any other."""
        return bool(self.held and self.coming)

    def told(self) -> dict[str, Any]:
        """What `das status` shows of it."""
        return {
            "number": self.number, "process": self.process, "up": self.up, "snapshots": list(self.held), "coming": sorted(self.coming),
            "fragments": len(self.running),
        }  # fmt: skip

    def takes(self, work: Work) -> bool:
        """Whether it can have one more."""
        if work.alone or any(other.alone for other in self.running.values()):
            return self.up and not self.running
        return self.up and len(self.running) < CALLS


@dataclass
class Came:
    """What came back for a work: what it took, or the error. `died`: its actor did, `beside` so many other works."""

    work: Work
    scored: Scored | None = None
    error: BaseException | None = None
    died: bool = False
    beside: int = 0


@dataclass
class Pool:
    """`smallest` to `largest` actors that `start` makes; at most `rollover` of them load a next snapshot at once."""

    start: Callable[[], Any]
    smallest: int
    largest: int
    rollover: int
    members: list[Member] = field(default_factory=list)
    _number: int = 0
    _enough_since: float = field(default_factory=time.monotonic)
    _starting: dict[Any, Member] = field(default_factory=dict)
    _failed_starts: int = 0

    def resize(self, fragments: int) -> None:
        """An actor for each fragment that is left, within the bounds: grows at once, shrinks by one after a while."""
        wanted = min(max(fragments, self.smallest), self.largest)
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
        member = Member(self.start(), self._number)
        self.members.append(member)
        self._starting[member.actor.ready.remote()] = member

    def _remove(self, member: Member) -> None:
        self.members = [other for other in self.members if other is not member]
        self._starting = {ref: other for ref, other in self._starting.items() if other is not member}

    def give(self, work: Work) -> bool:
        """Hand a work to the actor that has least in hand; False when none can have it now."""
        free = [member for member in self.members if member.takes(work)]
        fit = [member for member in free if work.version in member.held]
        if not fit and sum(member.loading for member in self.members) < self.rollover:
            fit = free
        fit = fit or [member for member in free if not member.held or work.version in member.coming]
        if not fit:
            return False
        member = min(fit, key=lambda member: len(member.running))
        work.given_s = time.monotonic()
        member.running[member.actor.score.remote(work.window, work.fragment, work.version)] = work
        return True

    def has(self, window: int) -> bool:
        """True while an actor has a fragment of a window in hand, be it by a version that is no longer wanted: it may still write."""
        return any(work.window == window for member in self.members for work in member.running.values())

    def wait(self, timeout_s: float) -> list[Any]:
        """References that are ready, after waiting for the first."""
        refs = [*(ref for member in self.members for ref in member.running), *self._starting]
        if not refs:
            time.sleep(timeout_s)
            return []
        ray.wait(refs, timeout=timeout_s)
        ready: list[Any] = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        return ready

    def collect(self, ready: Sequence[Any]) -> list[Came]:
        """What has come back by these references; an actor that has died, or does not answer, is replaced."""
        running = {ref: member for member in self.members for ref in member.running}
        came: list[Came] = []
        for ref in ready:
            if ref in self._starting:
                self._started(ref)
            elif ref in running and ref in running[ref].running:
                came += self._returned(running[ref], ref)
        for member in [member for member in self.members if member.silent_s > CALL_S]:
            told = f"actor {member.number} (process {member.process}) has not answered for {member.silent_s:.0f} s and was killed"
            ray.kill(member.actor)
            came += self._lost(member, TimeoutError(told))
        return came

    def _started(self, ref: Any) -> None:
        member = self._starting.pop(ref)
        try:
            member.process = ray.get(ref)
            member.up, self._failed_starts = True, 0
        except RayActorError:
            self._remove(member)
            self._failed_starts += 1
            if self._failed_starts >= START_TRIES:
                raise
            self._start()

    def _returned(self, member: Member, ref: Any) -> list[Came]:
        try:
            scored: Scored = ray.get(ref)
        except RayError as error:
            if isinstance(error, RayTaskError) or not isinstance(error, RayActorError):  # raised by the call; the actor lives
                return [Came(member.running.pop(ref), error=error)]
            return self._lost(member, error)
        work = member.running.pop(ref)
        if scored.rows:  # otherwise it was on disk, and no snapshot was taken up
            others = [version for version in member.held if version != work.version]
            member.held = [*others[1 - VERSIONS :], work.version]
        return [Came(work, scored)]

    def _lost(self, member: Member, error: BaseException) -> list[Came]:
        """Replace an actor; what it had in hand."""
        lost = list(member.running.values())
        self._remove(member)
        self._start()
        return [Came(work, error=error, died=True, beside=len(lost) - 1) for work in lost]

    def stop(self) -> None:
        """End all actors."""
        for member in self.members:
            ray.kill(member.actor)
        self.members, self._starting = [], {}
