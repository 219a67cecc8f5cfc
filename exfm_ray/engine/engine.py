"""One model spread over the workers of the default process group.

It consists of sharded tables and a sharded dense part, and has checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from exfm_ray.config.models import ModelConfig
from exfm_ray.config.trainer import TrainerConfig
from exfm_ray.data.batch import Batch
from exfm_ray.distillation.student import Logits, Student
from exfm_ray.engine.dense import gathered_state, shard_dense
from exfm_ray.engine.dense_state import local_dense_state, restore_dense_state
from exfm_ray.engine.ema import EMA
from exfm_ray.engine.row_weight_decay import RowDecay
from exfm_ray.engine.tables import Shard, ShardedTables
from exfm_ray.engine.tensor_store import RowNumbers, RowUpdate, ShardedTensors, cpu_copy
from exfm_ray.models.layout import Layout
from exfm_ray.schema import Schema


class Engine:
    """Forward and backward pass and update of a student.

    The FM is a student too, with all its tasks and no further head. All workers call every method
    together, with batches of equal length.
    """

    def __init__(
        self,
        schema: Schema,
        config: TrainerConfig,
        student: Student,
        model: ModelConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.tables = ShardedTables(schema, config, model, seed, device)
        torch.set_float32_matmul_precision(config.matmul_precision)
        if config.compile:
            student.network.backbone.compile()
        world = dist.get_world_size()
        self.dense: Any = shard_dense(student.to(device), config, world)
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32

        optimizer = config.optimizer
        self._decay: RowDecay | None = None
        if optimizer.table_weight_decay:
            layout = Layout.from_config(model, schema)
            self._decay = RowDecay(layout, optimizer.table_weight_decay, world)
        self._average: EMA | None = None
        if optimizer.ema:
            self._average = EMA(self._named_weights(), optimizer.ema)

    def _named_weights(self) -> dict[str, Tensor]:
        """Return all weights by the names that their averages have in a checkpoint."""
        weights: dict[str, Tensor] = {}
        for shard in self.tables.shards():
            weights[f"tables/{shard.table}/average@{shard.first_row}"] = shard.weight_RW
        for name, parameter in self.dense.module.named_parameters():
            weights[f"dense/{name}/average@0"] = parameter
        return weights

    def forward(self, batch: Batch, repeats_BS: Tensor | None = None) -> Logits:
        """Return float32 logits.

        Args:
            batch: the same number of examples on every worker.
            repeats_BS: see `RowDecay`; needed for learning if `decays` is true.
        """
        embedded_BRE = self.tables(batch)
        if self._decay and repeats_BS is not None:
            embedded_BRE = self._decay(embedded_BRE, repeats_BS)
        embedded_BRE = embedded_BRE.to(self._dtype)
        dense_BD = batch.dense_BD.to(self._dtype)
        logits: Logits = self.dense(embedded_BRE, dense_BD)
        return logits

    @property
    def decays(self) -> bool:
        """True if learning needs `repeats_BS`."""
        return self._decay is not None

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Return the logits that are served: logits_BT, float32."""
        self.dense.eval()
        logits = self.forward(batch)
        self.dense.train()
        return logits.serving_BT

    def update(self, loss: Tensor) -> None:
        """Do one step of both optimizers.

        Args:
            loss: this worker's loss; the gradient is the mean over the workers.
        """
        self.dense.backward(loss)
        self.dense.step()
        if self._average:
            self._average.step()

    def reset_rows(self, rows: Mapping[str, RowNumbers]) -> None:
        """Reset table rows to their initial values, with optimizer state and moving average.

        Args:
            rows: table -> row numbers.
        """
        written = self.tables.reset(rows)
        self._reset_ema_rows(written)

    def write_rows(self, rows: Mapping[str, RowUpdate], weight: float) -> None:
        """Move table rows towards given ones; see `ShardedTables.write_rows`.

        Their moving average takes the new value at once.
        """
        written = self.tables.write_rows(rows, weight)
        self._reset_ema_rows(written)

    def _reset_ema_rows(self, written: Sequence[tuple[Shard, Tensor]]) -> None:
        """Start the moving average of written rows at their values.

        Args:
            written: all shards in order, each with the numbers of its written rows.
        """
        if not self._average:
            return
        averages = self._average.averages
        for average_RW, (shard, row_X) in zip(averages, written, strict=False):
            average_RW[row_X] = shard.weight_RW[row_X]

    def ema_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the weights are those to evaluate and to publish.

        These are their moving averages if `optimizer.ema` is set.
        """
        if self._average is None:
            return nullcontext()
        return self._average.applied()

    def dense_state(self) -> dict[str, Tensor]:
        """Return the whole dense part, float32 on the CPU; every worker must call this."""
        return gathered_state(self.dense)

    def table_shards(self) -> dict[str, Tensor]:
        """Return this worker's table rows on the CPU by `table@first_row`.

        On a CPU they are views, not copies.
        """
        rows = {}
        for shard in self.tables.shards():
            rows[f"{shard.table}@{shard.first_row}"] = shard.weight_RW.cpu()
        return rows

    def momentum_shards(self) -> dict[str, Tensor]:
        """Return the Adagrad state of this worker's rows, in the form of `table_shards`."""
        momentum = {}
        for shard in self.tables.shards():
            momentum[f"{shard.table}@{shard.first_row}"] = shard.momentum_R.cpu()
        return momentum

    def state(self) -> dict[str, Tensor]:
        """Return this worker's part of a checkpoint, copied to the CPU.

        The names are those that `ShardedTensors` reads.
        """
        state = {}
        for name, tensor in local_dense_state(self.dense).items():
            state[f"dense/{name}"] = tensor
        for shard in self.tables.shards():
            prefix = f"tables/{shard.table}"
            momentum_R = shard.momentum_R.view(-1)
            state[f"{prefix}/weight@{shard.first_row}"] = cpu_copy(shard.weight_RW)
            state[f"{prefix}/momentum@{shard.first_row}"] = cpu_copy(momentum_R)

        if self._average:
            is_first = dist.get_rank() == 0
            for name, tensor in self._average.state().items():
                if is_first or not name.startswith("dense/"):
                    state[name] = tensor
        return state

    def restore(self, tensors: ShardedTensors) -> None:
        """Restore a checkpoint; all workers must call this.

        It may come from another number of workers, way of sharding and ZeRO stage.
        """
        restore_dense_state(self.dense, tensors.with_prefix("dense"))
        for shard in self.tables.shards():
            prefix = f"tables/{shard.table}"
            count = len(shard.weight_RW)
            weight_RW = tensors.slice(f"{prefix}/weight", shard.first_row, count)
            momentum_R = tensors.slice(f"{prefix}/momentum", shard.first_row, count)
            shard.weight_RW.copy_(weight_RW)
            shard.momentum_R.view(-1).copy_(momentum_R)
        if self._average:
            self._average.restore(tensors)
