"""The actor that scores fragments with a teacher's snapshots."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import ray
import torch

from exfm_ray.das.sharded_teacher import ShardedModel, start_shards
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.data.batch import Batch, to_batch
from exfm_ray.data.stream import EventStream, Fragment
from exfm_ray.models.serialization import LocalModel

MAX_IN_FLIGHT = 3
"""Fragments that an actor has at once: it reads one, computes another and writes a third."""
MAX_LOADED = 2
"""Snapshots that an actor holds: the one it scores with, and the next or the last one."""

LoadedModel = tuple[LocalModel | ShardedModel, tuple[str, ...]]
"""A snapshot's model and the tasks that it predicts."""


@dataclass(frozen=True)
class ScoreResult:
    """What scoring a fragment took.

    Attributes:
        rows: scored rows; 0 if the supervision was on disk already.
        seconds: seconds of computing.
    """

    rows: int
    seconds: float


def score_rows(
    model: LocalModel,
    rows: Batch,
    batch_size: int,
) -> np.ndarray:
    """Return probabilities, float32 (rows, tasks), computed `batch_size` rows at a time."""
    parts = [model.score(batch).numpy() for batch in rows.split(batch_size)]
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


class Scorer:
    """Scores fragments.

    Several threads may call it at once: while one computes, others read, write or load a snapshot.
    """

    def __init__(self, spec: LabelingSpec) -> None:
        das = spec.das
        self._spec = spec
        if das.threads:
            torch.set_num_threads(das.threads)
        self._shards = []
        if das.table_shards > 1:
            self._shards = start_shards(spec.snapshots, das.table_shards, spec.labels)
        self._loaded: dict[int, LoadedModel] = {}
        self._load_lock = threading.Lock()
        self._compute_lock = threading.Lock()

    @cached_property
    def _stream(self) -> EventStream:
        """The stream. An unavailable storage fails the first call, not the actor's start."""
        return EventStream.open(self._spec.stream_root)

    def ready(self) -> int:
        """Return the id of this actor's process, once it runs."""
        return os.getpid()

    def load_snapshot(self, version: int) -> tuple[str, ...]:
        """Load a snapshot unless it is loaded already, and return the tasks that it predicts.

        Computations in progress go on meanwhile.
        """
        _, tasks = self._model(version)
        return tasks

    def _model(self, version: int) -> LoadedModel:
        with self._load_lock:
            if version not in self._loaded:
                loaded = self._load(version)
                oldest = list(self._loaded)[: 1 - MAX_LOADED]
                for old in oldest:
                    del self._loaded[old]
                self._loaded[version] = loaded
            return self._loaded[version]

    def _load(self, version: int) -> LoadedModel:
        snapshots = self._spec.snapshots
        digest = self._stream.schema.digest
        if not self._shards:
            return snapshots.load(version, digest)
        network, manifest = snapshots.load_dense(version, digest)
        model = ShardedModel(network, manifest, version, self._shards)
        return model, manifest.tasks

    def score(
        self,
        window: int,
        fragment: Fragment,
        version: int,
    ) -> ScoreResult:
        """Score a fragment and write its supervision, unless that is on disk already.

        Raises:
            SnapshotError: the snapshot is damaged, or of another schema.
            UserError: the snapshot may have learned from the window (rule 2), the fragment cannot
                be read, or a prediction is NaN or infinite.
        """
        spec = self._spec
        spec.policy.refuse_later_snapshot(version, window, "scored by")
        if spec.store.is_written(window, fragment, version):
            return ScoreResult(0, 0.0)

        table = self._stream.read(window, fragment)
        rows = to_batch(table, self._stream.schema)
        model, tasks = self._model(version)
        if isinstance(model, ShardedModel):
            model = model.with_rows_of(rows)

        with self._compute_lock:
            started = time.perf_counter()
            p_NT = score_rows(model, rows, spec.das.batch_size)
            seconds = time.perf_counter() - started

        predictions = {task: p_NT[:, i] for i, task in enumerate(tasks)}
        spec.store.write(window, fragment, table["example_id"], version, predictions)
        return ScoreResult(table.num_rows, seconds)


ScorerActor = ray.remote(max_concurrency=MAX_IN_FLIGHT + 1)(Scorer)
