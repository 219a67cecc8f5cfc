"""Exponential moving average of a model's weights (Polyak and Juditsky, 1992).

The average is evaluated and published in place of the weights. It is a second copy of all weights,
tables included, and an update reads all of them, so it is meant for models whose tables are small
compared with the computation of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from exfm_ray.engine.tensor_store import ShardedTensors, cpu_copy

EVERY = 8
"""Steps between two updates; an update's decay is the decay per step to this power."""


class EMA:
    """The moving average of some weights, in float32.

    It begins as the plain mean of the weights so far: the decay of update n, counted from 0, is
    min(decay ** EVERY, n / (n + 1)).

    Attributes:
        averages: one for each weight.
        steps: number of steps so far.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """Start the average at the current weights.

        Args:
            weights: by the names that their averages have in a checkpoint (see `ShardedTensors`).
            decay: per step.
        """
        self.steps = 0
        self._names = list(weights)
        self._weights = list(weights.values())
        self._decay = decay
        self.averages = []
        for weight in self._weights:
            average = weight.detach().float().clone()
            self.averages.append(average)

    @torch.no_grad()
    def step(self) -> None:
        """Count a step of the optimizers and update the averages if it is time."""
        self.steps += 1
        if self.steps % EVERY:
            return
        previous_updates = self.steps // EVERY - 1
        mean_decay = previous_updates / (previous_updates + 1)
        decay = min(self._decay**EVERY, mean_decay)
        for average, weight in zip(self.averages, self._weights, strict=True):
            average.lerp_(weight.float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the weights by their averages inside the block."""
        originals = [weight.detach().clone() for weight in self._weights]
        self._set_weights(self.averages)
        try:
            yield
        finally:
            self._set_weights(originals)

    @torch.no_grad()
    def _set_weights(self, values: Sequence[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Return the averages and the step count for a checkpoint, copied to the CPU."""
        state = {}
        for name, average in zip(self._names, self.averages, strict=True):
            state[name] = cpu_copy(average)
        state["average_steps"] = torch.tensor(self.steps)
        return state

    def restore(self, tensors: ShardedTensors) -> None:
        """Restore what `state` returned, on any number of workers."""
        for sharded_name, average in zip(self._names, self.averages, strict=True):
            name, _, first_row = sharded_name.rpartition("@")
            values = tensors.slice(name, int(first_row), len(average))
            average.copy_(values)
        steps = tensors["average_steps"]
        self.steps = int(steps)
