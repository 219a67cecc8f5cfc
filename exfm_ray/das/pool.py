"""The pool of scorer actors: grows and shrinks with its backlog, outlives the death of an actor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from exfm_ray.das.scorer import Scored
from exfm_ray.data.stream import Fragment, Window
from exfm_ray.errors import UserError

FRAGMENTS_PER_CALL = 4
TRIES = 3
SCORE_S = 3600.0
"""Longest wait for one call of an actor, its start included."""


@dataclass
class _Call:
    window: int
    fragments: tuple[Fragment, ...]
    tries: int = 0


@dataclass
class Pool:
    """Scores windows on `min_actors` to `max_actors` actors that `start` makes."""

    start: Callable[[], Any]
    min_actors: int
    max_actors: int
    actors: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.resize(0)

    def resize(self, calls: int) -> None:
        """One actor for each waiting call, within the bounds; grows at once, shrinks by one."""
        wanted = min(max(calls, self.min_actors), self.max_actors)
        while len(self.actors) < wanted:
            self.actors.append(self.start())
        if len(self.actors) > wanted:
            ray.kill(self.actors.pop())

    def score(self, window: Window, version: int) -> Iterator[Scored]:
        """Score all fragments of a window, yielding as they are done. An actor that dies is replaced and its call made
        again, `TRIES` times at most; any other error ends the window uncommitted."""
        parts = [window.fragments[i : i + FRAGMENTS_PER_CALL] for i in range(0, len(window.fragments), FRAGMENTS_PER_CALL)]
        waiting = deque(_Call(window.index, part) for part in parts)
        self.resize(len(waiting))
        idle, running = deque(self.actors), dict[Any, tuple[Any, _Call]]()
        while waiting or running:
            while waiting and idle:
                actor, call = idle.popleft(), waiting.popleft()
                running[actor.score.remote(call.window, call.fragments, version)] = (actor, call)
            ready, _ = ray.wait(list(running), timeout=SCORE_S)
            if not ready:
                raise UserError(f"the DAS waited {SCORE_S:.0f} s for {len(running)} actors to score fragments of window {window.index}")
            actor, call = running.pop(ready[0])
            try:
                yield from ray.get(ready[0])
            except RayActorError:
                call.tries += 1
                if call.tries >= TRIES:
                    raise
                self.actors.remove(actor)
                actor = self.start()
                self.actors.append(actor)
                waiting.append(call)
            idle.append(actor)

    def stop(self) -> None:
        """End all actors."""
        while self.actors:
            ray.kill(self.actors.pop())
