"""A lane is one model that learns in this process; lanes of one domain form a group and see the
same batches."""

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
from exfm_ray.engine.engine import Engine
from exfm_ray.engine.replica import ReplicatedModule
from exfm_ray.engine.stacked import StackedModule
from exfm_ray.engine.tensor_store import ShardedTensors

LOSSES_KEPT = 64
"""How many losses, of this worker's shares, a lane remembers on the device."""


class ModelName(NamedTuple):
    """A model that a lane teaches: its name in files, its name in figures."""

    name: str
    model: str


@dataclass
class ModelTrainer:
    """One model: its engine, the arm it learns by, the positions of its tasks in the stream's."""

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
        """Names the lane in files."""
        return f"{self.model}-{self.arm}" if self.arm else self.model

    @property
    def uses_history(self) -> bool:
        """True when it reads examples with their history."""
        return self.arm is not None and self.arm.uses_history

    @property
    def learners(self) -> Sequence[ModelName]:
        """The model that it teaches."""
        return (ModelName(self.name, self.model),)

    def predict(self, batch: Batch) -> Mapping[str, Tensor]:
        """Serving logits_BT, float32, of each learner by name."""
        return {self.name: self.engine.predict(batch)}

    def learn(
        self,
        batch: Batch,
        weight_B: Tensor,
        teacher_BT: Tensor | None,
        repeats_BS: Tensor | None = None,
    ) -> None:
        """One step. `weight_B` makes the sum over this worker's rows the mean over the global batch
        after averaging over workers; it is 0 for rows that only fill up the share."""
        started = time.perf_counter()
        logits = self.engine.forward(batch, repeats_BS)
        labels_BT = batch.labels_BT[:, list(self.tasks)]
        adapted_BT = self.adapter(teacher_BT) if self.adapter and teacher_BT is not None else None
        if self.arm is None:
            loss_B = labels_objective_B(logits.serving_BT, labels_BT)
        elif adapted_BT is not None:
            # One backward pass serves both: the adapter's target carries no gradient, so neither
            # loss reaches the other's weights.
            loss_B = objective_B(
                self.arm.objective,
                self.weights,
                logits,
                labels_BT,
                teacher_BT,
                target_BT(adapted_BT),
            )
            loss_B = loss_B + labels_objective_B(adapted_BT, labels_BT)
        else:
            loss_B = objective_B(
                self.arm.objective, self.weights, logits, labels_BT, teacher_BT, None
            )
        loss = (loss_B * weight_B).sum()
        self.losses.append(loss.detach())
        self.engine.update(loss)
        if self.adapter and adapted_BT is not None:
            self.adapter.step()
        self.seconds += time.perf_counter() - started

    def first_bad_loss(self) -> int | None:
        """Which of the steps since the last call had a loss that is not a number; None where all
        are. Waits for the device."""
        if not self.losses:
            return None
        bad_X = torch.nonzero(~torch.isfinite(torch.stack(list(self.losses))))
        self.losses.clear()
        return int(bad_X[0]) if len(bad_X) else None

    def state(self) -> dict[str, Tensor]:
        """This worker's part of the lane's state, copied to the CPU."""
        state = self.engine.state()
        if isinstance(self.adapter, ReplicatedModule) and dist.get_rank() == 0:
            state |= {f"adapter/{name}": tensor for name, tensor in self.adapter.state().items()}
        return state

    def restore(self, parts: ShardedTensors) -> None:
        """From what all workers' `state()` gave."""
        self.engine.restore(parts)
        if isinstance(self.adapter, ReplicatedModule):
            self.adapter.restore(parts.with_prefix("adapter"))
