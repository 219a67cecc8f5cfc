"""The DAS of a run: scores every window that may be supervised, as soon as its snapshot is published."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from exfm_ray.config import Config
from exfm_ray.das.lag import version_for
from exfm_ray.das.pool import Pool
from exfm_ray.das.scorer import ScorerActor
from exfm_ray.das.snapshots import SnapshotStore
from exfm_ray.das.supervision import SupervisionStore
from exfm_ray.data.stream import EventStream
from exfm_ray.files import append_lines, read_lines

POLL_S = 0.1


@dataclass
class DAS:
    """Supervision for the windows of one stream by one teacher."""

    config: Config
    stream: EventStream

    def __post_init__(self) -> None:
        folder, teacher = self.config.folder, self.config.fm.name
        self.snapshots = SnapshotStore(folder / "snapshots", teacher)
        self.store = SupervisionStore(folder / "supervision", teacher)

    def missing(self, windows: Sequence[int]) -> list[int]:
        """Windows that have a teacher but no committed supervision."""
        return [w for w in windows if version_for(w, self.config.das.fm_lag) is not None and not self.store.has(w)]

    @property
    def log(self) -> Path:
        """When each window was scored. Kept apart from the supervision, which is the same bytes in every run."""
        return self.config.folder / "timeline.jsonl"

    def done(self) -> tuple[float, int]:
        """Seconds, without waiting, and examples of the windows scored so far."""
        lines = [line for line in read_lines(self.log) if line["role"] == "das"]
        return sum(line["ended_s"] - line["started_s"] - line["waited_s"] for line in lines), sum(line["examples"] for line in lines)

    def run(self, windows: Sequence[int], progress: Callable[[int, int], None], watch: Callable[[], None]) -> None:
        """Score what is missing, in order. `watch` is called while waiting for a snapshot; it raises to end the wait.

        Snapshots that no window needs any more are removed, the newest one always stays.
        """
        das = self.config.das
        missing = self.missing(windows)
        if not missing:
            return
        pool = Pool(self._start_actor, das.min_actors, das.max_actors)
        try:
            for window in missing:
                version = version_for(window, das.fm_lag)
                assert version is not None
                started = time.time()
                while not self.snapshots.has(version):
                    watch()
                    time.sleep(POLL_S)
                self._score(pool, window, version, started, progress)
                self.snapshots.remove_before(version)
        finally:
            pool.stop()

    def _start_actor(self) -> ray.actor.ActorHandle:
        das = self.config.das
        actor = ScorerActor.options(label_selector=self.config.placement.das)
        return actor.remote(self.stream.root, self.snapshots, self.store, das.fm_lag, das.batch_size, das.threads)

    def _score(self, pool: Pool, window: int, version: int, started: float, progress: Callable[[int, int], None]) -> None:
        """Score a window and commit its supervision; `started`: when the wait for its snapshot began."""
        begun, waited = time.perf_counter(), max(time.time() - started, 0.0)
        manifest = self.stream.window(window)
        for scored in pool.score(manifest, version):
            progress(window, scored.rows)
        tasks = self.snapshots.tasks(version)
        self.store.commit(manifest, version, tasks, self.config.das.fm_lag)
        ended = started + waited + time.perf_counter() - begun
        span = {"role": "das", "window": window, "phase": "score", "started_s": started, "ended_s": ended, "waited_s": waited}
        append_lines(self.log, [span | {"examples": manifest.rows, "snapshot": version}])
