"""One model spread over the workers of the default process group: sharded tables, sharded dense
part, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from exfm_ray.config.models import ModelConfig
from exfm_ray.config.trainer import TrainerConfig
from exfm_ray.data.batch import Batch
from exfm_ray.distillation.student import Logits, Student
from exfm_ray.engine.dense import gathered_state, shard_dense
from exfm_ray.engine.dense_state import dense_parts, restore_dense
from exfm_ray.engine.ema import EMA
from exfm_ray.engine.row_weight_decay import RowDecay
from exfm_ray.engine.tables import Shard, ShardedTables
from exfm_ray.engine.tensor_store import RowUpdate, ShardedTensors, cpu_copy
from exfm_ray.models.layout import Layout
from exfm_ray.schema import Schema


class Engine:
    """Forward, backward and update of a student (the FM is one too: with all its tasks and no
    further head).

    All workers call every method in step, with batches of one and the same length.
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
        self.dense: Any = shard_dense(student.to(device), config, dist.get_world_size())
        weight_decay = config.optimizer.table_weight_decay
        self._decay = (
            RowDecay(Layout.from_config(model, schema), weight_decay, dist.get_world_size())
            if weight_decay
            else None
        )
        weights = {
            f"tables/{shard.table}/average@{shard.first_row}": shard.weight_RW
            for shard in self.tables.shards()
        }
        weights |= {
            f"dense/{name}/average@0": parameter
            for name, parameter in self.dense.module.named_parameters()
        }
        self._average = EMA(weights, config.optimizer.ema) if config.optimizer.ema else None
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32

    def forward(self, batch: Batch, repeats_BS: Tensor | None = None) -> Logits:
        """Logits in float32; keeps the graph when gradients are on. `repeats_BS`: see `decay`,
        needed to learn where `decays`."""
        embedded_BRE = self.tables(batch)
        if self._decay and repeats_BS is not None:
            embedded_BRE = self._decay(embedded_BRE, repeats_BS)
        logits: Logits = self.dense(embedded_BRE.to(self._dtype), batch.dense_BD.to(self._dtype))
        return logits

    @property
    def decays(self) -> bool:
        """True when learning needs `repeats_BS`."""
        return self._decay is not None

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Serving logits_BT, float32."""
        self.dense.eval()
        logits = self.forward(batch).serving_BT
        self.dense.train()
        return logits

    def update(self, loss: Tensor) -> None:
        """One step of both optimizers. `loss` is this worker's share: the gradient is the mean over
        workers."""
        self.dense.backward(loss)
        self.dense.step()
        if self._average:
            self._average.step()

    def reset_rows(self, rows: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Make table rows (table -> row numbers) fresh again, with their optimizer state and their
        moving average."""
        self._reset_ema_rows(self.tables.reset(rows))

    def give_rows(self, rows: Mapping[str, RowUpdate], weight: float) -> None:
        """Move table rows towards those given (see `ShardedTables.give`); their moving average
        takes the new value at once."""
        self._reset_ema_rows(self.tables.write_rows(rows, weight))

    def _reset_ema_rows(self, written: Sequence[tuple[Shard, Tensor]]) -> None:
        """The moving average of rows that were written starts from them."""
        for number, (shard, row_X) in enumerate(written):
            if self._average:
                self._average.averages[number][row_X] = shard.weight_RW[row_X]

    def ema_weights(self) -> AbstractContextManager[None]:
        """Inside, the weights are those to evaluate and to publish: their moving average, where
        there is one."""
        return self._average.applied() if self._average else nullcontext()

    def dense_state(self) -> dict[str, Tensor]:
        """The whole dense part, float32 on the CPU; every worker must call it."""
        return gathered_state(self.dense)

    def table_shards(self) -> dict[str, Tensor]:
        """This worker's table rows on the CPU, keyed `table@first_row`; views, not copies, where
        they lie there already."""
        return {f"{s.table}@{s.first_row}": s.weight_RW.cpu() for s in self.tables.shards()}

    def momentum_shards(self) -> dict[str, Tensor]:
        """The Adagrad state of this worker's rows, as `table_shards`."""
        return {f"{s.table}@{s.first_row}": s.momentum_R.cpu() for s in self.tables.shards()}

    def state(self) -> dict[str, Tensor]:
        """This worker's part of a checkpoint, copied to the CPU; names as `ShardedTensors` reads
        them."""
        state = {f"dense/{name}": tensor for name, tensor in dense_parts(self.dense).items()}
        for shard in self.tables.shards():
            state[f"tables/{shard.table}/weight@{shard.first_row}"] = cpu_copy(shard.weight_RW)
            state[f"tables/{shard.table}/momentum@{shard.first_row}"] = cpu_copy(
                shard.momentum_R.view(-1)
            )
        if self._average:
            whole = dist.get_rank() == 0
            state |= {
                name: tensor
                for name, tensor in self._average.state().items()
                if whole or not name.startswith("dense/")
            }
        return state

    def restore(self, parts: ShardedTensors) -> None:
        """Take the state of a checkpoint, of any number of workers, kind of sharding and stage of
        ZeRO; all workers call it."""
        restore_dense(self.dense, parts.with_prefix("dense"))
        for shard in self.tables.shards():
            shard.weight_RW.copy_(
                parts.slice(f"tables/{shard.table}/weight", shard.first_row, len(shard.weight_RW))
            )
            shard.momentum_R.view(-1).copy_(
                parts.slice(f"tables/{shard.table}/momentum", shard.first_row, len(shard.weight_RW))
            )
        if self._average:
            self._average.restore(parts)
