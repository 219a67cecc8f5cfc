"""Embedding tables sharded over the workers by TorchRec, with an optimizer in the backward pass.

`models.embeddings.LocalTables` are the same tables on one device, without fbgemm; a test checks
that both are equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
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
from exfm_ray.engine.tensor_store import RowNumbers, RowUpdate
from exfm_ray.models.embeddings import initial_rows, initial_table
from exfm_ray.models.layout import POOLED, Layout, Slot, expand_bags
from exfm_ray.planner.table_placement import place_tables
from exfm_ray.schema import Schema

ADAGRAD_EPS = 1e-8


@dataclass(frozen=True)
class Shard:
    """The rows of one table that this worker holds.

    Attributes:
        table: name of the table.
        first_row: number of the first row.
        weight_RW: the rows, a view.
        momentum_R: their row-wise Adagrad state, a view.
    """

    table: str
    first_row: int
    weight_RW: Tensor
    momentum_R: Tensor

    @property
    def end_row(self) -> int:
        """Number of the row after the last one."""
        return self.first_row + len(self.weight_RW)


class ShardedTables(nn.Module):
    """Tables of a schema over all workers of the default process group.

    forward: Batch -> embedded_BRE, float32, rows in the order of `models.layout`, bags mean-pooled.
    Every worker must call forward and backward together, with batches of equal length.
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

        positions = [slot.position for slot in layout.bags]
        widths = [slot.width for slot in layout.bags]
        self.bag_O = torch.tensor(layout.bag_of_O, dtype=torch.int64, device=device)
        self.position_O = torch.tensor(positions, dtype=torch.int64, device=device)
        self.whole_bags = all(position == POOLED for position in positions)
        self.single_rows = sum(slot.width for slot in layout.single)
        bag_numbers = torch.arange(len(widths), device=device)
        width_O = torch.tensor(widths, dtype=torch.int64, device=device)
        self.slot_of_bag_R = bag_numbers.repeat_interleave(width_O)

        self.collection = _shard_collection(schema, config, layout, model.dim, self.slots, device)
        self._output_row_R: Tensor | None = None
        self._in_order = False
        self._initialize()

    def _initialize(self) -> None:
        """Set the initial values of this worker's rows; they do not depend on the sharding."""
        for shard in self.shards():
            initial_RW = initial_table(
                shard.table,
                self.rows[shard.table],
                shard.weight_RW.shape[1],
                self.seed,
                shard.first_row,
                shard.end_row,
                self.init_std,
            )
            shard.weight_RW.copy_(initial_RW)

    def forward(self, batch: Batch) -> Tensor:
        B, S = batch.sparse_BS.shape
        values_V = batch.bag_values_V
        lengths_OB = batch.bag_lengths_MB
        if not self.whole_bags:
            values_V, lengths_OB = expand_bags(values_V, lengths_OB, self.bag_O, self.position_O)
        single_values = batch.sparse_BS.T.flatten()
        single_lengths = torch.ones(S * B, dtype=torch.int64, device=self.device)
        jagged = KeyedJaggedTensor(
            keys=self.keys,
            values=torch.cat([single_values, values_V]),
            lengths=torch.cat([single_lengths, lengths_OB.flatten()]),
        )

        pooled = self.collection(jagged).wait()
        embedded_BRE: Tensor = pooled.values().view(B, -1, self.dim)
        if self._output_row_R is None:
            output_rows = self._output_rows(pooled.keys())
            self._output_row_R = torch.tensor(output_rows, device=self.device)
            self._in_order = bool((self._output_row_R.diff() == 1).all())
        if not self._in_order:
            # index_select takes a third of the time of indexing.
            embedded_BRE = embedded_BRE.index_select(1, self._output_row_R)
        if not len(self.slot_of_bag_R):
            return embedded_BRE
        return embedded_BRE * self._mean_scale_BR1(lengths_OB)

    def _mean_scale_BR1(self, lengths_OB: Tensor) -> Tensor:
        """Return the factors that turn the sums over bags into means.

        TorchRec's own mean divides by the length + 1e-6 if a table is split by rows, which is
        sixteen times the rounding of float32, and by the length alone if it is not. The result of a
        training would depend on the sharding.
        """
        examples = lengths_OB.shape[1]
        rows = self.single_rows + len(self.slot_of_bag_R)
        scale_BR = torch.ones(examples, rows, device=self.device)
        length_BO = lengths_OB.clamp(min=1).T.float()
        scale_BR[:, self.single_rows :] = length_BO.reciprocal()[:, self.slot_of_bag_R]
        return scale_BR[:, :, None]

    def _output_rows(self, keys: list[str]) -> list[int]:
        """Return for each row in the layout's order its position in TorchRec's output.

        TorchRec groups the slots by table.

        Args:
            keys: the slots' keys in the order of the output.
        """
        width = {slot.key: slot.width for slot in self.slots}
        starts = accumulate((width[key] for key in keys), initial=0)
        start_of = dict(zip(keys, starts, strict=False))
        rows: list[int] = []
        for slot in self.slots:
            start = start_of[slot.key]
            rows += range(start, start + slot.width)
        return rows

    def shards(self) -> Iterator[Shard]:
        """Yield views of the rows that this worker holds; writing to them changes the tables."""
        for kernel in self._kernels():
            weights = kernel.emb_module.split_embedding_weights()
            states = kernel.emb_module.split_optimizer_states()
            tables = kernel.config.embedding_tables
            for table, weight, state in zip(tables, weights, states, strict=True):
                assert table.local_metadata is not None
                first_row = table.local_metadata.shard_offsets[0]
                yield Shard(table.name, first_row, weight.detach(), state[0].detach())

    def _kernels(self) -> Iterator[BatchedFusedEmbeddingBag]:
        for lookup in self.collection._lookups:
            for module in lookup.modules():
                if isinstance(module, BatchedFusedEmbeddingBag):
                    yield module

    @torch.no_grad()
    def reset(self, rows: Mapping[str, RowNumbers]) -> list[tuple[Shard, Tensor]]:
        """Reset rows to their initial values and zero optimizer state.

        Rows on other workers are ignored.

        Args:
            rows: table -> row numbers.

        Returns:
            All shards in the order of `shards`, each with the rows that were reset in it, counted
            from the shard's first row.
        """
        no_rows = np.empty(0, np.int64)
        written = []
        for shard in self.shards():
            requested_X = rows.get(shard.table, no_rows)
            in_shard = (requested_X >= shard.first_row) & (requested_X < shard.end_row)
            local_X = requested_X[in_shard]
            initial_XW = initial_rows(
                shard.table,
                self.rows[shard.table],
                shard.weight_RW.shape[1],
                self.seed,
                local_X,
                self.init_std,
            )
            row_X = torch.from_numpy(local_X - shard.first_row).to(self.device)
            shard.weight_RW[row_X] = initial_XW.to(self.device)
            shard.momentum_R[row_X] = 0
            written.append((shard, row_X))
        return written

    @torch.no_grad()
    def write_rows(
        self, rows: Mapping[str, RowUpdate], weight: float
    ) -> list[tuple[Shard, Tensor]]:
        """Move rows towards given ones. Rows on other workers are ignored.

        Args:
            rows: table -> rows.
            weight: fraction of the way, in (0, 1]; 1 replaces the rows.

        Returns:
            All shards in the order of `shards`, each with the rows that were written in it, counted
            from the shard's first row.
        """
        written = []
        for shard in self.shards():
            update = rows.get(shard.table)
            if update is None:
                row_X = torch.empty(0, dtype=torch.int64, device=self.device)
            else:
                row_X = self._write_shard(shard, update, weight)
            written.append((shard, row_X))
        return written

    def _write_shard(
        self,
        shard: Shard,
        update: RowUpdate,
        weight: float,
    ) -> Tensor:
        """Write the rows of `update` that lie in `shard`; return them counted from its first."""
        first, end = np.searchsorted(update.id_X, [shard.first_row, shard.end_row])
        row_X = torch.from_numpy(update.id_X[first:end] - shard.first_row).to(self.device)
        row_XW = update.row_XW[first:end].to(self.device)
        if weight < 1:
            row_XW = torch.lerp(shard.weight_RW[row_X], row_XW, weight)
        shard.weight_RW.index_copy_(0, row_X, row_XW)
        if update.momentum_X is not None:
            momentum_X = update.momentum_X[first:end].to(self.device)
            shard.momentum_R[row_X] = momentum_X
        return row_X


class _Sharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]  # torchrec has no types
    """A sharder that allows row-wise sharding on a CPU, which TorchRec's default refuses."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["row_wise", "table_wise"]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["fused"]


def _shard_collection(
    schema: Schema,
    config: TrainerConfig,
    layout: Layout,
    dim: int,
    slots: Sequence[Slot],
    device: torch.device,
) -> Any:
    """Build TorchRec's sharded collection of the tables, with uninitialized rows."""
    tables = []
    for name, rows in schema.tables.items():
        table = EmbeddingBagConfig(
            name=name,
            embedding_dim=layout.embeddings[name] * dim,
            num_embeddings=rows,
            pooling=PoolingType.SUM,
            feature_names=[slot.key for slot in slots if slot.table == name],
        )
        tables.append(table)
    collection = EmbeddingBagCollection(device=torch.device("meta"), tables=tables)

    sharder = _Sharder(
        fused_params={
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": config.optimizer.table_lr,
            "eps": ADAGRAD_EPS,
        }
    )
    plan = sharding_plan(schema, config.sharding, collection, sharder, device)
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    return sharder.shard(collection, plan, env, device=device)


def sharding_plan(
    schema: Schema,
    sharding: Literal["row_wise", "table_wise"],
    collection: EmbeddingBagCollection,
    sharder: _Sharder,
    device: torch.device,
) -> EmbeddingModuleShardingPlan:
    """Return TorchRec's plan for the placement that `planner.table_placement` calculates.

    The plan names the kernel. By default TorchRec takes the dense kernel on a CPU, which has no
    fused optimizer and would leave the tables unchanged.
    """
    world = dist.get_world_size()
    shardings = {}
    for table, rank in place_tables(schema.tables, sharding, world).items():
        if rank is None:
            shardings[table] = row_wise(compute_kernel="fused")
        else:
            shardings[table] = table_wise(rank=rank, compute_kernel="fused")
    return construct_module_sharding_plan(
        collection,
        shardings,
        sharder,
        local_size=min(world, _local_world_size()),
        world_size=world,
        device_type=device.type,
    )


def _local_world_size() -> int:
    world = dist.get_world_size()
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))
