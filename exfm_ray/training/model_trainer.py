"""One model that learns in this process. The trainers of a `BatchGroup` see the same batches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from exfm_ray.config.arms import Arm
from exfm_ray.data.batch import Batch
from exfm_ray.distillation.adapter import target_BT
from exfm_ray.distillation.objective import Weights, labels_objective_B, objective_B
from exfm_ray.distillation.student import Logits
from exfm_ray.engine.engine import Engine
from exfm_ray.engine.replica import ReplicatedModule
from exfm_ray.engine.stacked import StackedModule
from exfm_ray.engine.tensor_store import ShardedTensors
from exfm_ray.training.train_batch import TrainBatch

LOSSES_KEPT = 64
"""How many losses, each of this worker's slice of a batch, a trainer keeps on the device."""


class ModelName(NamedTuple):
    """Names of a model.

    Attributes:
        name: in files.
        model: in metrics.
    """

    name: str
    model: str


@dataclass
class ModelTrainer:
    """Trains one model.

    Attributes:
        model: name of the student or the FM.
        arm: how it learns; None for the FM.
        tasks: positions of its tasks among the tasks of the stream.
        weights: of the terms of the loss.
        adapter: the student adapter of the arm `ah_sa`.
        seconds: spent in `learn`.
        losses: of the steps since the last call of `first_bad_loss`, on the device.
    """

    model: str
    arm: Arm | None
    tasks: tuple[int, ...]
    engine: Engine
    weights: Weights
    adapter: ReplicatedModule | StackedModule | None = None
    seconds: float = 0.0
    losses: deque[Tensor] = field(default_factory=lambda: deque(maxlen=LOSSES_KEPT), init=False)

    @property
    def name(self) -> str:
        """Name of the trainer in files."""
        return f"{self.model}-{self.arm}" if self.arm else self.model

    @property
    def uses_history(self) -> bool:
        """True if its model reads the history of each example's user."""
        return self.arm is not None and self.arm.uses_history

    @property
    def model_names(self) -> Sequence[ModelName]:
        """Names of the models that it trains."""
        return (ModelName(self.name, self.model),)

    def predict(self, batch: Batch) -> Mapping[str, Tensor]:
        """Serving logits_BT, float32, for each model by name."""
        return {self.name: self.engine.predict(batch)}

    def learn(self, batch: TrainBatch) -> None:
        """Take one optimizer step on a batch."""
        started = time.perf_counter()
        inputs = batch.inputs(self.uses_history)
        logits = self.engine.forward(inputs, batch.repeats_BS)
        labels_BT = inputs.labels_BT[:, list(self.tasks)]
        adapted_BT = self._adapted(batch.teacher_BT)

        loss_B = self._loss_B(logits, labels_BT, batch.teacher_BT, adapted_BT)
        loss = (loss_B * batch.weight_B).sum()
        self.losses.append(loss.detach())
        self.engine.update(loss)
        if self.adapter and adapted_BT is not None:
            self.adapter.step()
        self.seconds += time.perf_counter() - started

    def _adapted(self, teacher_BT: Tensor | None) -> Tensor | None:
        """Logits of the student adapter; None without an adapter or without supervision."""
        if self.adapter is None or teacher_BT is None:
            return None
        adapted_BT: Tensor = self.adapter(teacher_BT)
        return adapted_BT

    def _loss_B(
        self,
        logits: Logits,
        labels_BT: Tensor,
        teacher_BT: Tensor | None,
        adapted_BT: Tensor | None,
    ) -> Tensor:
        if self.arm is None:
            return labels_objective_B(logits.serving_BT, labels_BT)
        adapter_target_BT = None if adapted_BT is None else target_BT(adapted_BT)
        student_loss_B = objective_B(
            self.arm.objective, self.weights, logits, labels_BT, teacher_BT, adapter_target_BT
        )
        if adapted_BT is None:
            return student_loss_B
        # One backward pass serves both: the adapter's target carries no gradient, so neither loss
        # reaches the other's weights.
        return student_loss_B + labels_objective_B(adapted_BT, labels_BT)

    def first_bad_loss(self) -> int | None:
        """Position of the first step since the last call whose loss is not finite, else None.

        Waits for the device.
        """
        if not self.losses:
            return None
        losses_X = torch.stack(list(self.losses))
        self.losses.clear()
        bad_X = torch.nonzero(~torch.isfinite(losses_X))
        return int(bad_X[0]) if len(bad_X) else None

    def state(self) -> dict[str, Tensor]:
        """This worker's part of the trainer's state, copied to the CPU."""
        state = self.engine.state()
        if isinstance(self.adapter, ReplicatedModule) and dist.get_rank() == 0:
            adapter_state = self.adapter.state()
            state |= {f"adapter/{name}": tensor for name, tensor in adapter_state.items()}
        return state

    def restore(self, stored: ShardedTensors) -> None:
        """Restore the union of what `state()` returned on all workers."""
        self.engine.restore(stored)
        if isinstance(self.adapter, ReplicatedModule):
            self.adapter.restore(stored.with_prefix("adapter"))
