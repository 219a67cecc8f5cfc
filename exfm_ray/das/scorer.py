"""The actor that scores fragments with one snapshot of the FM."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch

from exfm_ray.das.lag import version_for
from exfm_ray.das.snapshots import SnapshotStore
from exfm_ray.das.supervision import SupervisionStore
from exfm_ray.data.batch import to_batch
from exfm_ray.data.stream import EventStream, Fragment
from exfm_ray.errors import UserError
from exfm_ray.models.stored import PlainModel
from exfm_ray.schema import Schema


@dataclass(frozen=True)
class Scored:
    """What scoring a fragment took."""

    rows: int
    seconds: float


def score_table(model: PlainModel, table: pa.Table, schema: Schema, batch_size: int) -> np.ndarray:
    """Probabilities (rows, tasks), float32, of packed rows; the rows are cut every `batch_size`, from the first on."""
    parts = [model.score(batch).numpy() for batch in to_batch(table, schema).split(batch_size)]
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


@dataclass
class Scorer:
    """Holds a snapshot, scores fragments; reads the next one and writes the last one meanwhile."""

    stream_root: Path
    snapshots: SnapshotStore
    store: SupervisionStore
    fm_lag: int
    batch_size: int
    threads: int

    def __post_init__(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        self._stream = EventStream.open(self.stream_root)
        self._version = -1
        self._model: PlainModel | None = None
        self._tasks: tuple[str, ...] = ()
        self._io = ThreadPoolExecutor(2)

    def take(self, version: int) -> tuple[str, ...]:
        """Take up a snapshot, unless it is held already; returns the tasks it predicts."""
        if version != self._version:
            self._model, self._tasks = self.snapshots.load(version, self._stream.schema.digest)
            self._version = version
        return self._tasks

    def score(self, window: int, fragments: Sequence[Fragment], version: int) -> list[Scored]:
        """Score fragments of a window and write each one's supervision; those that are on disk already cost nothing."""
        allowed = version_for(window, self.fm_lag)
        if allowed is None or version > allowed:
            raise UserError(f"window {window} must not be scored by snapshot {version}: das.fm_lag = {self.fm_lag} allows {allowed} or older")
        tasks = self.take(version)
        assert self._model is not None
        missing = [f for f in fragments if not self.store.scored(window, f, version)]
        done, writes = [], []
        for fragment, table in self._read_ahead(window, missing):
            started = time.perf_counter()
            p_NT = score_table(self._model, table, self._stream.schema, self.batch_size)
            predictions = {task: p_NT[:, i] for i, task in enumerate(tasks)}
            writes.append(self._io.submit(self.store.write, window, fragment, table["example_id"], version, predictions))
            done.append(Scored(table.num_rows, time.perf_counter() - started))
        for write in writes:
            write.result()
        return done

    def _read_ahead(self, window: int, fragments: Sequence[Fragment]) -> Iterator[tuple[Fragment, pa.Table]]:
        """The fragments' rows, the next one read while the current one is scored."""
        reads = deque(self._io.submit(self._stream.read, window, f) for f in fragments[:1])
        for position, fragment in enumerate(fragments):
            reads.extend(self._io.submit(self._stream.read, window, f) for f in fragments[position + 1 : position + 2])
            yield fragment, reads.popleft().result()


ScorerActor = ray.remote(Scorer)
