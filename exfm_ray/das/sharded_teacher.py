"""A teacher larger than one actor: its tables lie, cut by rows, in processes of their own, and a
scorer asks them for the rows it needs.

All rows that a fragment reads come in one answer from each holder; the scorer then computes as if
it held the tables, on the same numbers in the same order, so its predictions are the same to the
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
from exfm_ray.errors import UserError
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.network import Network
from exfm_ray.models.serialization import (
    LocalModel,
    StoredModel,
    checked_manifest,
    load_rows,
    read_stored_model,
)
from exfm_ray.storage.remote import AnyPath, StorageError
from exfm_ray.stores.snapshots import SnapshotError, SnapshotStore

HELD = 2
RPC_TIMEOUT_S = 1800.0
"""Longest that a holder may take for the rows of a fragment, a snapshot's loading included; then it
is started again."""
Array = np.ndarray[Any, Any]


def row_range(
    rows: int,
    shard: int,
    shards: int,
) -> range:
    """The rows of a table that a holder holds: all but the last ones hold equally many."""
    size = -(-rows // shards)
    return range(min(shard * size, rows), min((shard + 1) * size, rows))


class TableShard:
    """The rows of one share of every table, of up to two versions."""

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
        self._loading = threading.Lock()
        here = ray.get_runtime_context() if ray.is_initialized() else None
        self._restarted = bool(
            here and here.get_actor_id() and here.was_current_actor_reconstructed
        )

    def rows(self, version: int, row_X: Array) -> Array:
        """Rows (X, E) by their numbers among the rows held here, tables one after the other. Loads
        the version where it is new."""
        with self._loading:
            if version not in self._weights:
                loaded = self._load(version)
                for old in list(self._weights)[: 1 - HELD]:
                    del self._weights[old]
                self._weights[version] = loaded
            weight = self._weights[version]
        return weight[row_X]

    def _load(self, version: int) -> Array:
        folder = self._snapshots.folder(version)
        manifest = (
            self._checked(folder) if self._restarted else read_stored_model(folder)
        )  # whoever asks has just checked the hashes
        tables = manifest.example.tables
        parts = load_rows(
            folder,
            manifest,
            {name: row_range(rows, self._shard, self._shards) for name, rows in tables.items()},
        )
        weight: Array = torch.cat(
            [parts[name].reshape(-1, manifest.network.dim) for name in tables]
        ).numpy()
        return weight

    @staticmethod
    def _checked(folder: AnyPath) -> StoredModel:
        """For one that was started again: whoever asks may have checked the hashes long ago."""
        try:
            return checked_manifest(folder)
        except StorageError:
            raise
        except UserError as error:
            raise SnapshotError(str(error)) from None


HolderActor = ray.remote(TableShard)


def start_holders(
    snapshots: SnapshotStore,
    shards: int,
    labels: Mapping[str, str],
) -> list[Any]:
    """The holders of one replica, on different nodes, with these labels. One that dies is started
    again, and asked again, by Ray."""
    detached = {"max_restarts": -1, "max_task_retries": -1, "max_concurrency": 4}
    actor = HolderActor.options(
        num_cpus=0, scheduling_strategy="SPREAD", label_selector=labels, **detached
    )
    return [actor.remote(snapshots, shard, shards) for shard in range(shards)]


class ShardedModel:
    """The network of one version, whose tables `holders` hold."""

    def __init__(
        self,
        network: Network,
        manifest: StoredModel,
        version: int,
        holders: Sequence[Any],
    ) -> None:
        self._network = network
        self._version = version
        self._holders = holders
        self._tables = LocalTables(manifest.example, manifest.network, seed=None, held=False)
        pieces = []  # (first number among all rows, holder, first number among the holder's rows)
        held = [0] * len(holders)
        for name, rows in manifest.example.tables.items():
            width = self._tables.embeddings[name]
            for shard in range(len(holders)):
                mine = row_range(rows, shard, len(holders))
                if mine:
                    pieces.append(
                        (self._tables.first_row[name] + mine.start * width, shard, held[shard])
                    )
                held[shard] += len(mine) * width
        self._start_P, self._holder_P, self._held_P = torch.tensor(
            pieces, dtype=torch.int64
        ).T.contiguous()

    def with_rows_of(self, batch: Batch) -> LocalModel:
        """A model that scores any part of `batch`: it has all rows that these examples read."""
        ids_BS, rows_V, _ = self._tables.numbers(
            batch.sparse_BS, batch.bag_values_V, batch.bag_lengths_MB
        )
        row_U = torch.unique(torch.cat([ids_BS.flatten(), rows_V]))
        return LocalModel(
            GatheredRows(self._tables, row_U, self._gather(row_U)), self._network
        ).eval()

    def _gather(self, row_U: Tensor) -> Tensor:
        """Rows by their numbers, ascending: (U, E)."""
        piece_U = torch.bucketize(row_U, self._start_P, right=True) - 1
        local_U = row_U - self._start_P[piece_U] + self._held_P[piece_U]
        holder_U = self._holder_P[piece_U]
        mine = [holder_U == shard for shard in range(len(self._holders))]
        answers = self._answers(
            [
                h.rows.remote(self._version, local_U[m].numpy())
                for h, m in zip(self._holders, mine, strict=True)
            ]
        )
        weight_UE = torch.empty(len(row_U), answers[0].shape[1])
        for chosen, rows in zip(mine, answers, strict=True):
            weight_UE[chosen] = torch.from_numpy(rows.copy())  # Ray's arrays are read-only
        return weight_UE

    def _answers(self, refs: Sequence[Any]) -> list[Array]:
        """What the holders say; those that do not answer are started again."""
        try:
            answers: list[Array] = ray.get(list(refs), timeout=RPC_TIMEOUT_S)
            return answers
        except GetTimeoutError:
            late = set(ray.wait(list(refs), num_returns=len(refs), timeout=0)[1])
            for shard in (shard for shard, ref in enumerate(refs) if ref in late):
                ray.kill(self._holders[shard], no_restart=False)
            told = f"{len(late)} of {len(refs)} holders of tables have not answered for {RPC_TIMEOUT_S:.0f} s and were started again"
            raise TimeoutError(told) from None


class GatheredRows(LocalTables):
    """Tables of which only the rows `row_U` (ascending) are here."""

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
        """As `LocalTables.embed`, of examples that read no other rows."""
        ids_BS, rows_V, lengths_OB = self._tables.numbers(sparse_BS, bag_values_V, bag_lengths_MB)
        ids_BS = torch.searchsorted(self._row_U, ids_BS)
        rows_V = torch.searchsorted(self._row_U, rows_V)
        return self._tables.pool(ids_BS, rows_V, lengths_OB, self._weight_UE)
