"""The actor that scores fragments with snapshots of the FM."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import ray
import torch

from exfm_ray.das.sharded_teacher import ShardedModel, start_holders
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.data.batch import Batch, to_batch
from exfm_ray.data.stream import EventStream, Fragment
from exfm_ray.errors import UserError
from exfm_ray.models.serialization import LocalModel

MAX_IN_FLIGHT = 3
"""Fragments that an actor has in hand at once: it reads one, computes another, writes a third."""
MAX_LOADED = 2
"""Snapshots that an actor holds: the one it scores with, and the next or the last one."""


@dataclass(frozen=True)
class ScoreResult:
    """What scoring a fragment took: 0 rows when its supervision was on disk already; seconds of
    computing."""

    rows: int
    seconds: float


def score_rows(
    model: LocalModel,
    rows: Batch,
    batch_size: int,
) -> np.ndarray:
    """Probabilities (rows, tasks), float32; the rows are cut every `batch_size`, from the first
    on."""
    parts = [model.score(batch).numpy() for batch in rows.split(batch_size)]
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


class Scorer:
    """Scores fragments. Calls may come side by side, each from a thread: while one computes, others
    read, write or load a snapshot."""

    def __init__(self, order: LabelingSpec) -> None:
        self._order = order
        if order.das.threads:
            torch.set_num_threads(order.das.threads)
        self._holders = (
            start_holders(order.snapshots, order.das.table_shards, order.labels)
            if order.das.table_shards > 1
            else []
        )
        self._held: dict[int, tuple[Any, tuple[str, ...]]] = {}
        self._loading = threading.Lock()
        self._computing = threading.Lock()

    @cached_property
    def _stream(self) -> EventStream:
        """Opened by the first call: a storage that cannot be used fails that call, not the actor's
        start."""
        return EventStream.open(self._order.stream_root)

    def ready(self) -> int:
        """The process that holds this actor, once it runs."""
        import os

        return os.getpid()

    def load_snapshot(self, version: int) -> tuple[str, ...]:
        """Take up a snapshot, unless it is held already; returns the tasks it predicts. What is
        being computed goes on meanwhile."""
        return self._take(version)[1]

    def _take(self, version: int) -> tuple[Any, tuple[str, ...]]:
        with self._loading:
            if version not in self._held:
                loaded = self._load(version)
                for old in list(self._held)[: 1 - MAX_LOADED]:
                    del self._held[old]
                self._held[version] = loaded
            return self._held[version]

    def _load(self, version: int) -> tuple[Any, tuple[str, ...]]:
        snapshots = self._order.snapshots
        digest = self._stream.schema.digest
        if not self._holders:
            return snapshots.load(version, digest)
        network, manifest = snapshots.load_dense(version, digest)
        return ShardedModel(network, manifest, version, self._holders), manifest.tasks

    def score(
        self,
        window: int,
        fragment: Fragment,
        version: int,
    ) -> ScoreResult:
        """Score a fragment and write its supervision; one that is on disk already costs nothing.

        Raises:
            SnapshotError: the snapshot is damaged, or of another schema.
            UserError: it may have learned from the window (rule 2); the fragment cannot be read; a
                prediction is no number.
        """
        order = self._order
        if not order.policy.may_supervise(version, window):
            raise UserError(
                f"window {window} must not be scored by snapshot {version}: das.fm_lag = {order.policy.fm_lag} asks for one that has learned "
                f"no window after {window - order.policy.fm_lag}"
            )
        if order.store.is_written(window, fragment, version):
            return ScoreResult(0, 0.0)
        table = self._stream.read(window, fragment)
        rows = to_batch(table, self._stream.schema)
        model, tasks = self._take(version)
        if isinstance(model, ShardedModel):
            model = model.with_rows_of(rows)
        with self._computing:
            started = time.perf_counter()
            p_NT = score_rows(model, rows, order.das.batch_size)
            seconds = time.perf_counter() - started
        predictions = {task: p_NT[:, i] for i, task in enumerate(tasks)}
        order.store.write(window, fragment, table["example_id"], version, predictions)
        return ScoreResult(table.num_rows, seconds)


ScorerActor = ray.remote(max_concurrency=MAX_IN_FLIGHT + 1)(Scorer)
