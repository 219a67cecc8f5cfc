"""A long benchmark in parts: each one's result is kept as JSON in a folder, so that a killed
benchmark goes on with those that are missing."""

from __future__ import annotations

import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError

from exfm_ray.storage.atomic import read_json, write_text

SAY_S = 30.0
"""How often it is told how far the benchmark is."""


class Part(NamedTuple):
    """`name`: of its file; `kind`: parts of one kind take about as long as each other; `start`:
    gives a Ray reference of its result."""

    name: str
    kind: str
    start: Callable[[], Any]


@dataclass
class Parts:
    """The parts of one benchmark.

    Attributes:
        folder: where results are kept.
        together: so many run side by side.
        failed: name -> error of those that failed; they are tried again when the benchmark goes on.
    """

    folder: Path
    together: int
    failed: dict[str, str] = field(default_factory=dict)
    _seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def finish(self, title: str, parts: Sequence[Part]) -> dict[str, Any]:
        """Results by name: those that are kept, and those of the rest, which are run in order.
        Needs a Ray session."""
        results = {part.name: self._read(part) for part in parts if self._path(part.name).exists()}
        waiting = deque(part for part in parts if part.name not in results)
        print(f"{title}: {len(results)} of {len(parts)} parts are there", flush=True)
        running: dict[Any, tuple[Part, float]] = {}
        said = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < self.together:
                part = waiting.popleft()
                running[part.start()] = part, time.perf_counter()
            (ref,), _ = ray.wait(list(running), num_returns=1)
            part, started = running.pop(ref)
            try:
                results[part.name] = ray.get(ref)
                self._keep(part, time.perf_counter() - started, results[part.name])
            except RayError as error:
                self.failed[part.name] = str(error).strip().splitlines()[-1]
                print(f"{title}: {part.name} has failed: {self.failed[part.name]}", flush=True)
            if time.perf_counter() - said > SAY_S or not (waiting or running):
                said = time.perf_counter()
                left = self._left([*waiting, *(part for part, _ in running.values())])
                print(
                    f"{title}: {len(results)} of {len(parts)} parts; about {left / 60:.0f} min left of these",
                    flush=True,
                )
        return results

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """One result that is made here, while nothing else runs."""
        part = Part(name, name, make)
        if self._path(name).exists():
            return self._read(part)
        started = time.perf_counter()
        result = make()
        self._keep(part, time.perf_counter() - started, result)
        return result

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, part: Part) -> Any:
        told = read_json(self._path(part.name))
        self._seconds[part.kind].append(told["seconds"])
        return told["result"]

    def _keep(
        self,
        part: Part,
        seconds: float,
        result: Any,
    ) -> None:
        self._seconds[part.kind].append(seconds)
        write_text(self._path(part.name), json.dumps({"seconds": seconds, "result": result}))

    def _left(self, parts: Sequence[Part]) -> float:
        """Seconds that parts will take: each as long as those of its kind have, or as all have
        where there are none."""
        everything = [seconds for kind in self._seconds.values() for seconds in kind]
        known = {kind: sum(each) / len(each) for kind, each in self._seconds.items()}
        usual = sum(everything) / len(everything) if everything else 0.0
        return sum(known.get(part.kind, usual) for part in parts) / self.together
