"""Embedding tables sharded over the workers by TorchRec, their optimizer fused into the backward
pass.

The same tables on one device, without fbgemm, are `models.embeddings.LocalTables`; a test holds the
two equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingEnv

from exfm_ray.config.models import ModelConfig
from exfm_ray.config.trainer import TrainerConfig
from exfm_ray.data.batch import Batch
from exfm_ray.engine.tensor_store import RowUpdate
from exfm_ray.models.embeddings import initial_rows, initial_table
from exfm_ray.models.layout import POOLED, Layout, expand_bags
from exfm_ray.planner.table_placement import place_tables
from exfm_ray.schema import Schema

ADAGRAD_EPS = 1e-8


@dataclass(frozen=True)
class Shard:
    """The rows of one table that this worker holds, from `first_row` on, and their row-wise Adagrad
    state."""

    table: str
    first_row: int
    weight_RW: Tensor
    momentum_R: Tensor


class ShardedTables(nn.Module):
    """Tables of a schema over all workers of the default process group.

    forward: Batch -> embedded_BRE, float32, rows in the order of `models.layout`, bags mean-pooled.
    Every worker must call forward and backward in step, with batches of one and the same length.
    """

    def __init__(
        self,
        schema: Schema,
        config: TrainerConfig,
        model: ModelConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        layout = Layout.from_config(model, schema)
        self.slots = (*layout.single, *layout.bags)
        self.keys = [slot.key for slot in self.slots]
        self.dim = model.dim
        self.init_std = model.init_std
        self.device = device
        self.rows = schema.tables
        self.seed = seed
        self.bag_O = torch.tensor(layout.bag_of_O, dtype=torch.int64, device=device)
        self.position_O = torch.tensor(
            [slot.position for slot in layout.bags], dtype=torch.int64, device=device
        )
        self.whole_bags = all(slot.position == POOLED for slot in layout.bags)
        self.singles = sum(slot.width for slot in layout.single)
        widths = torch.tensor(
            [slot.width for slot in layout.bags], dtype=torch.int64, device=device
        )
        self.slot_of_bag_R = torch.arange(len(widths), device=device).repeat_interleave(widths)
        collection = EmbeddingBagCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    embedding_dim=layout.embeddings[name] * model.dim,
                    num_embeddings=rows,
                    pooling=PoolingType.SUM,
                    feature_names=[slot.key for slot in self.slots if slot.table == name],
                )
                for name, rows in schema.tables.items()
            ],
        )
        sharder = _Sharder(
            fused_params={
                "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
                "learning_rate": config.optimizer.table_lr,
                "eps": ADAGRAD_EPS,
            }
        )
        plan = sharding_plan(schema, config.sharding, collection, sharder, device)
        env = ShardingEnv.from_process_group(dist.group.WORLD)
        self.collection = sharder.shard(collection, plan, env, device=device)
        self._order_R: Tensor | None = None
        for shard in self.shards():
            last = shard.first_row + len(shard.weight_RW)
            width = shard.weight_RW.shape[1]
            shard.weight_RW.copy_(
                initial_table(
                    shard.table,
                    schema.tables[shard.table],
                    width,
                    seed,
                    shard.first_row,
                    last,
                    model.init_std,
                )
            )

    def forward(self, batch: Batch) -> Tensor:
        B, S = batch.sparse_BS.shape
        values_V = batch.bag_values_V
        lengths_OB = batch.bag_lengths_MB
        if not self.whole_bags:
            values_V, lengths_OB = expand_bags(values_V, lengths_OB, self.bag_O, self.position_O)
        jagged = KeyedJaggedTensor(
            keys=self.keys,
            values=torch.cat([batch.sparse_BS.T.flatten(), values_V]),
            lengths=torch.cat(
                [torch.ones(S * B, dtype=torch.int64, device=self.device), lengths_OB.flatten()]
            ),
        )
        pooled = self.collection(jagged).wait()
        embedded_BRE: Tensor = pooled.values().view(B, -1, self.dim)
        if self._order_R is None:
            self._order_R = torch.tensor(self._rows_in_order(pooled.keys()), device=self.device)
            self._ordered = bool((self._order_R.diff() == 1).all())
        if not self._ordered:
            embedded_BRE = embedded_BRE.index_select(1, self._order_R)  # a third of indexing's time
        return (
            embedded_BRE * self._share_BR1(lengths_OB) if len(self.slot_of_bag_R) else embedded_BRE
        )

    def _share_BR1(self, lengths_OB: Tensor) -> Tensor:
        """What turns sums into means. TorchRec's own mean divides by the length + 1e-6 where a
        table is cut by rows, which is sixteen times the rounding of float32, and then by the length
        alone where it is not: the same training would depend on the sharding."""
        share_BR = torch.ones(
            lengths_OB.shape[1], self.singles + len(self.slot_of_bag_R), device=self.device
        )
        share_BR[:, self.singles :] = (
            lengths_OB.clamp(min=1).T.float().reciprocal()[:, self.slot_of_bag_R]
        )
        return share_BR[:, :, None]

    def _rows_in_order(self, keys: list[str]) -> list[int]:
        """Sharding groups the slots by table: where the rows of each slot, in the layout's order,
        stand in its output."""
        width = {slot.key: slot.width for slot in self.slots}
        first = dict(zip(keys, accumulate((width[key] for key in keys), initial=0), strict=False))
        return [first[slot.key] + row for slot in self.slots for row in range(slot.width)]

    def shards(self) -> Iterator[Shard]:
        """Views of the rows that this worker holds; writing to them changes the tables."""
        for kernel in (
            module for lookup in self.collection._lookups for module in lookup.modules()
        ):
            if isinstance(kernel, BatchedFusedEmbeddingBag):
                weights = kernel.emb_module.split_embedding_weights()
                states = kernel.emb_module.split_optimizer_states()
                for table, weight, state in zip(
                    kernel.config.embedding_tables, weights, states, strict=True
                ):
                    assert table.local_metadata is not None
                    yield Shard(
                        table.name,
                        table.local_metadata.shard_offsets[0],
                        weight.detach(),
                        state[0].detach(),
                    )

    @torch.no_grad()
    def reset(self, rows: Mapping[str, np.ndarray[Any, Any]]) -> list[tuple[Shard, Tensor]]:
        """Give rows (table -> row numbers, int64 ascending) their first values and a momentum of
        zero, those of them that this worker holds.

        Returns:
            All shards, in the order of `shards`, each with the rows reset in it, counted from the
            shard's first.
        """
        none = np.empty(0, np.int64)
        done = []
        for shard in self.shards():
            own_X = rows.get(shard.table, none)
            own_X = own_X[
                (own_X >= shard.first_row) & (own_X < shard.first_row + len(shard.weight_RW))
            ]
            fresh_XW = initial_rows(
                shard.table,
                self.rows[shard.table],
                shard.weight_RW.shape[1],
                self.seed,
                own_X,
                self.init_std,
            )
            row_X = torch.from_numpy(own_X - shard.first_row).to(self.device)
            shard.weight_RW[row_X] = fresh_XW.to(self.device)
            shard.momentum_R[row_X] = 0
            done.append((shard, row_X))
        return done

    @torch.no_grad()
    def write_rows(
        self, rows: Mapping[str, RowUpdate], weight: float
    ) -> list[tuple[Shard, Tensor]]:
        """Move rows this far (`weight` in (0, 1]; 1: all the way) to those given by table, of them
        those that this worker holds.

        Returns:
            As `reset`.
        """
        done = []
        for shard in self.shards():
            given = rows.get(shard.table)
            row_X = torch.empty(0, dtype=torch.int64, device=self.device)
            if given is not None:
                first, last = np.searchsorted(
                    given.id_X, [shard.first_row, shard.first_row + len(shard.weight_RW)]
                )
                row_X = torch.from_numpy(given.id_X[first:last] - shard.first_row).to(self.device)
                row_XW = given.row_XW[first:last].to(self.device)
                if weight < 1:
                    row_XW = torch.lerp(shard.weight_RW[row_X], row_XW, weight)
                shard.weight_RW.index_copy_(0, row_X, row_XW)
                if given.momentum_X is not None:
                    shard.momentum_R[row_X] = given.momentum_X[first:last].to(self.device)
            done.append((shard, row_X))
        return done


class _Sharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]  # torchrec has no types
    """TorchRec refuses row-wise sharding on CPU unless the sharder names it."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["row_wise", "table_wise"]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["fused"]


def sharding_plan(
    schema: Schema,
    sharding: Literal["row_wise", "table_wise"],
    collection: EmbeddingBagCollection,
    sharder: _Sharder,
    device: torch.device,
) -> EmbeddingModuleShardingPlan:
    """The tables as `models.dealing` deals them.

    The kernel is named: left to itself, TorchRec takes the dense kernel on CPU, which has no fused
    optimizer and so would leave the tables as they are.
    """
    world = dist.get_world_size()
    ways = {
        table: row_wise(compute_kernel="fused")
        if rank is None
        else table_wise(rank=rank, compute_kernel="fused")
        for table, rank in place_tables(schema.tables, sharding, world).items()
    }
    return construct_module_sharding_plan(
        collection,
        ways,
        sharder,
        local_size=min(world, _local_world_size()),
        world_size=world,
        device_type=device.type,
    )


def _local_world_size() -> int:
    import os

    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
