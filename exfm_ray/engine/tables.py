"""Embedding tables sharded over the workers by TorchRec, their optimizer fused into the backward pass.

The same tables on one device, without fbgemm, are `models.embeddings.PlainTables`; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingEnv

from exfm_ray.config import TrainerConfig
from exfm_ray.data.batch import Batch
from exfm_ray.models.embeddings import initial_table
from exfm_ray.schema import Schema

ADAGRAD_EPS = 1e-8


@dataclass(frozen=True)
class Shard:
    """The rows of one table that this worker holds, from `first_row` on, and their row-wise Adagrad state."""

    table: str
    first_row: int
    weight_RE: Tensor
    momentum_R: Tensor


class ShardedTables(nn.Module):
    """Tables of a schema over all workers of the default process group.

    forward: Batch -> embedded_BFE, float32, features in the order (*schema.single, *schema.bags), bags mean-pooled.
    Every worker must call forward and backward in step, with batches of one and the same length.
    """

    def __init__(self, schema: Schema, config: TrainerConfig, dim: int, seed: int, device: torch.device) -> None:
        super().__init__()
        features = (*schema.single, *schema.bags)
        self.keys = [f.name for f in features]
        self.dim, self.device = dim, device
        collection = EmbeddingBagCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingBagConfig(
                    name=name, embedding_dim=dim, num_embeddings=rows, pooling=PoolingType.MEAN,
                    feature_names=[f.name for f in features if (f.table or f.name) == name],
                )
                for name, rows in schema.tables.items()
            ],
        )  # fmt: skip
        sharder = _Sharder(
            fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": config.optimizer.table_lr, "eps": ADAGRAD_EPS}
        )
        plan = sharding_plan(schema, config.sharding, collection, sharder, device)
        env = ShardingEnv.from_process_group(dist.group.WORLD)
        self.collection = sharder.shard(collection, plan, env, device=device)
        self._order: list[int] | None = None
        for shard in self.shards():
            last = shard.first_row + len(shard.weight_RE)
            shard.weight_RE.copy_(initial_table(shard.table, schema.tables[shard.table], dim, seed, shard.first_row, last))

    def forward(self, batch: Batch) -> Tensor:
        B, S = batch.sparse_BS.shape
        jagged = KeyedJaggedTensor(
            keys=self.keys,
            values=torch.cat([batch.sparse_BS.T.flatten(), batch.bag_values_V]),
            lengths=torch.cat([torch.ones(S * B, dtype=torch.int64, device=self.device), batch.bag_lengths_MB.flatten()]),
        )
        pooled = self.collection(jagged).wait()
        embedded_BFE: Tensor = pooled.values().view(B, len(self.keys), self.dim)
        if self._order is None:  # sharding groups the features by table: put them back, once it is known how
            position = {key: i for i, key in enumerate(pooled.keys())}
            self._order = [position[key] for key in self.keys]
        if self._order != list(range(len(self.keys))):
            embedded_BFE = embedded_BFE[:, self._order]
        return embedded_BFE

    def shards(self) -> Iterator[Shard]:
        """Views of the rows that this worker holds; writing to them changes the tables."""
        for kernel in (module for lookup in self.collection._lookups for module in lookup.modules()):
            if isinstance(kernel, BatchedFusedEmbeddingBag):
                weights = kernel.emb_module.split_embedding_weights()
                states = kernel.emb_module.split_optimizer_states()
                for table, weight, state in zip(kernel.config.embedding_tables, weights, states, strict=True):
                    assert table.local_metadata is not None
                    yield Shard(table.name, table.local_metadata.shard_offsets[0], weight.detach(), state[0].detach())


class _Sharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]  # torchrec has no types
    """TorchRec refuses row-wise sharding on CPU unless the sharder names it."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["row_wise", "table_wise"]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["fused"]


def sharding_plan(
    schema: Schema, sharding: str, collection: EmbeddingBagCollection, sharder: _Sharder, device: torch.device
) -> EmbeddingModuleShardingPlan:
    """Row-wise: each table is cut over all workers. Table-wise: whole tables, the largest first to the least laden worker.

    The kernel is named: left to itself, TorchRec takes the dense kernel on CPU, which has no fused optimizer and so
    would leave the tables as they are.
    """
    world = dist.get_world_size()
    load = [0] * world
    ways = {}
    for table, rows in sorted(schema.tables.items(), key=lambda item: (-item[1], item[0])):
        if sharding == "row_wise":
            ways[table] = row_wise(compute_kernel="fused")
        else:
            rank = load.index(min(load))
            load[rank] += rows
            ways[table] = table_wise(rank=rank, compute_kernel="fused")
    return construct_module_sharding_plan(
        collection, ways, sharder, local_size=min(world, _local_world_size()), world_size=world, device_type=device.type
    )


def _local_world_size() -> int:
    import os

    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
