"""A teacher larger than one actor: its tables are cut by rows and lie in processes of their own.

A scorer asks every table shard once for all rows that a fragment reads. It then computes as if it
held the tables, with the same numbers in the same order, so its predictions are the same to the
bit.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError
from torch import Tensor

from exfm_ray.data.batch import Batch
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.network import Network
from exfm_ray.models.serialization import (
    LocalModel,
    StoredModel,
    checked_manifest,
    load_rows,
    read_stored_model,
)
from exfm_ray.stores.snapshots import SnapshotStore, snapshot_errors

MAX_LOADED = 2
"""Versions that a table shard holds."""
RPC_TIMEOUT_S = 1800.0
"""Longest time that a table shard may take for a fragment's rows, with loading a snapshot; then
it is restarted."""
Array = np.ndarray[Any, Any]


def row_range(
    rows: int,
    shard: int,
    shards: int,
) -> range:
    """Return the rows of a table that a shard holds: equally many, except in the last ones."""
    size = -(-rows // shards)
    start = min(shard * size, rows)
    end = min(start + size, rows)
    return range(start, end)


class TableShard:
    """A range of rows of every table, for up to `MAX_LOADED` versions."""

    def __init__(
        self,
        snapshots: SnapshotStore,
        shard: int,
        shards: int,
    ) -> None:
        self._snapshots = snapshots
        self._shard = shard
        self._shards = shards
        self._weights: dict[int, Array] = {}
        self._load_lock = threading.Lock()
        self._restarted = _is_restarted_actor()

    def rows(self, version: int, row_X: Array) -> Array:
        """Return some of the rows of a version, float32 (X, E). Loads the version if it is new.

        Args:
            version: the snapshot.
            row_X: numbers among this shard's rows, which lie one table after the other.
        """
        with self._load_lock:
            if version not in self._weights:
                loaded = self._load(version)
                oldest = list(self._weights)[: 1 - MAX_LOADED]
                for old in oldest:
                    del self._weights[old]
                self._weights[version] = loaded
            weight = self._weights[version]
        return weight[row_X]

    def _load(self, version: int) -> Array:
        manifest = self._manifest(version)
        tables = manifest.example.tables
        ranges = {name: row_range(rows, self._shard, self._shards) for name, rows in tables.items()}
        parts = load_rows(self._snapshots.folder(version), manifest, ranges)
        dim = manifest.network.dim
        weights = [parts[name].reshape(-1, dim) for name in tables]
        weight: Array = torch.cat(weights).numpy()
        return weight

    def _manifest(self, version: int) -> StoredModel:
        """Read a version's manifest; a restarted shard also checks the hashes of its files.

        Otherwise the scorer has just checked them. Before a restart that may be long ago.
        """
        folder = self._snapshots.folder(version)
        if not self._restarted:
            return read_stored_model(folder)
        with snapshot_errors():
            return checked_manifest(folder)


def _is_restarted_actor() -> bool:
    if not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    return bool(context.get_actor_id()) and bool(context.was_current_actor_reconstructed)


TableShardActor = ray.remote(TableShard)


def start_shards(
    snapshots: SnapshotStore,
    shards: int,
    labels: Mapping[str, str],
) -> list[Any]:
    """Start the table shards of one replica, spread over the nodes with these labels.

    Ray restarts a shard that dies and repeats the calls that it had.
    """
    actor = TableShardActor.options(
        num_cpus=0,
        scheduling_strategy="SPREAD",
        label_selector=labels,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=4,
    )
    return [actor.remote(snapshots, shard, shards) for shard in range(shards)]


class ShardedModel:
    """The network of one version, whose tables lie in shards."""

    def __init__(
        self,
        network: Network,
        manifest: StoredModel,
        version: int,
        shards: Sequence[Any],
    ) -> None:
        self._network = network
        self._version = version
        self._shards = shards
        self._tables = LocalTables(manifest.example, manifest.network, seed=None, held=False)

        # P: pieces of tables, in the order of the rows of all tables. A piece is (number of its
        # first row among all rows, its shard, number of its first row among the shard's rows).
        pieces = []
        shard_sizes = [0] * len(shards)
        for name, rows in manifest.example.tables.items():
            width = self._tables.embeddings[name]
            first_row = self._tables.first_row[name]
            for shard in range(len(shards)):
                local_rows = row_range(rows, shard, len(shards))
                if local_rows:
                    start = first_row + local_rows.start * width
                    pieces.append((start, shard, shard_sizes[shard]))
                shard_sizes[shard] += len(local_rows) * width
        columns = torch.tensor(pieces, dtype=torch.int64).T.contiguous()
        self._start_P, self._shard_P, self._local_start_P = columns

    def with_rows_of(self, batch: Batch) -> LocalModel:
        """Return a model that can score any part of `batch`: it has all rows that these read."""
        ids_BS, rows_V, _ = self._tables.numbers(
            batch.sparse_BS, batch.bag_values_V, batch.bag_lengths_MB
        )
        row_U = torch.unique(torch.cat([ids_BS.flatten(), rows_V]))
        tables = GatheredRows(self._tables, row_U, self._gather(row_U))
        return LocalModel(tables, self._network).eval()

    def _gather(self, row_U: Tensor) -> Tensor:
        """Return rows, float32 (U, E), by their numbers among all rows, ascending."""
        piece_U = torch.bucketize(row_U, self._start_P, right=True) - 1
        local_U = row_U - self._start_P[piece_U] + self._local_start_P[piece_U]
        shard_U = self._shard_P[piece_U]

        masks = [shard_U == number for number in range(len(self._shards))]
        refs = []
        for shard, is_local_U in zip(self._shards, masks, strict=True):
            row_X = local_U[is_local_U].numpy()
            refs.append(shard.rows.remote(self._version, row_X))
        answers = self._answers(refs)

        weight_UE = torch.empty(len(row_U), answers[0].shape[1])
        for is_local_U, rows in zip(masks, answers, strict=True):
            writable = rows.copy()  # Ray's arrays are read-only
            weight_UE[is_local_U] = torch.from_numpy(writable)
        return weight_UE

    def _answers(self, refs: Sequence[Any]) -> list[Array]:
        """Wait for the shards' rows; restart the shards that do not answer."""
        try:
            answers: list[Array] = ray.get(list(refs), timeout=RPC_TIMEOUT_S)
            return answers
        except GetTimeoutError:
            _, late = ray.wait(list(refs), num_returns=len(refs), timeout=0)
            for shard, ref in zip(self._shards, refs, strict=True):
                if ref in late:
                    ray.kill(shard, no_restart=False)
            raise TimeoutError(
                f"{len(late)} of {len(refs)} table shards have not answered for "
                f"{RPC_TIMEOUT_S:.0f} s and were restarted"
            ) from None


class GatheredRows(LocalTables):
    """Tables of which only some rows are here.

    Args:
        tables: the tables.
        row_U: numbers of the rows among all rows, ascending.
        weight_UE: the rows.
    """

    def __init__(
        self,
        tables: LocalTables,
        row_U: Tensor,
        weight_UE: Tensor,
    ) -> None:
        torch.nn.Module.__init__(self)
        self._tables = tables
        self._row_U = row_U
        self._weight_UE = weight_UE

    def embed(
        self,
        sparse_BS: Tensor,
        bag_values_V: Tensor,
        bag_lengths_MB: Tensor,
    ) -> Tensor:
        """Embed like `LocalTables.embed`; the examples must not read other rows."""
        ids_BS, rows_V, lengths_OB = self._tables.numbers(sparse_BS, bag_values_V, bag_lengths_MB)
        local_BS = torch.searchsorted(self._row_U, ids_BS)
        local_V = torch.searchsorted(self._row_U, rows_V)
        return self._tables.pool(local_BS, local_V, lengths_OB, self._weight_UE)
