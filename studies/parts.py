"""A long study in parts. Each part's result is kept as JSON, so a killed study can be resumed."""

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

PROGRESS_S = 30.0
"""Seconds between lines of progress."""


class Part(NamedTuple):
    """A part of a study.

    Attributes:
        name: path of its file below the folder, without the suffix.
        kind: parts of one kind take about as long as each other.
        start: starts it and returns a Ray reference of its result.
    """

    name: str
    kind: str
    start: Callable[[], Any]


@dataclass
class Parts:
    """Runs the parts of one study and keeps their results.

    Attributes:
        folder: folder of the results.
        concurrent: how many parts run at a time.
        failed: name -> error of parts that failed; a resumed study tries them again.
    """

    folder: Path
    concurrent: int
    failed: dict[str, str] = field(default_factory=dict)
    _seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def finish(self, title: str, parts: Sequence[Part]) -> dict[str, Any]:
        """Run the missing parts in order and return all results by name.

        Parts that fail are left out. Needs a Ray session.
        """
        results = {part.name: self._read(part) for part in parts if self._path(part.name).exists()}
        waiting = deque(part for part in parts if part.name not in results)
        print(f"{title}: {len(results)} of {len(parts)} parts are finished", flush=True)

        running: dict[Any, tuple[Part, float]] = {}
        printed_at = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < self.concurrent:
                part = waiting.popleft()
                running[part.start()] = part, time.perf_counter()
            (ref,), _ = ray.wait(list(running), num_returns=1)
            part, started = running.pop(ref)
            self._collect(title, part, ref, started, results)

            is_last = not (waiting or running)
            if is_last or time.perf_counter() - printed_at > PROGRESS_S:
                printed_at = time.perf_counter()
                left = [*waiting, *(part for part, _ in running.values())]
                minutes = self._seconds_left(left) / 60
                progress = f"{len(results)} of {len(parts)} parts; about {minutes:.0f} min left"
                print(f"{title}: {progress}", flush=True)
        return results

    def _collect(
        self,
        title: str,
        part: Part,
        ref: Any,
        started: float,
        results: dict[str, Any],
    ) -> None:
        """Keep the result of a part that has ended, or note its error."""
        try:
            result = ray.get(ref)
        except RayError as error:
            self.failed[part.name] = str(error).strip().splitlines()[-1]
            print(f"{title}: {part.name} has failed: {self.failed[part.name]}", flush=True)
            return
        results[part.name] = result
        self._write(part, time.perf_counter() - started, result)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return one kept result; make it here, while nothing else runs, where it is missing."""
        part = Part(name, name, make)
        if self._path(name).exists():
            return self._read(part)
        started = time.perf_counter()
        result = make()
        self._write(part, time.perf_counter() - started, result)
        return result

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, part: Part) -> Any:
        entry = read_json(self._path(part.name))
        self._seconds[part.kind].append(entry["seconds"])
        return entry["result"]

    def _write(
        self,
        part: Part,
        seconds: float,
        result: Any,
    ) -> None:
        self._seconds[part.kind].append(seconds)
        write_text(self._path(part.name), json.dumps({"seconds": seconds, "result": result}))

    def _seconds_left(self, parts: Sequence[Part]) -> float:
        """Seconds that these parts will take, estimated by the mean of their kind, or of all."""
        every_part = [seconds for of_kind in self._seconds.values() for seconds in of_kind]
        overall = sum(every_part) / len(every_part) if every_part else 0.0
        mean_of = {kind: sum(of_kind) / len(of_kind) for kind, of_kind in self._seconds.items()}
        total = sum(mean_of.get(part.kind, overall) for part in parts)
        return total / self.concurrent
