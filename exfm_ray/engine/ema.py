"""An exponential moving average of a model's weights (Polyak and Juditsky, 1992): evaluated and
published in their place.

It holds a second copy of all weights, tables included, and reads them all every few steps: meant
for models whose tables are small beside the work of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from exfm_ray.engine.tensor_store import ShardedTensors, cpu_copy

EVERY = 8
"""Steps between two updates; the decay of a step to this power is the decay of an update."""


class EMA:
    """The moving average of `weights`, in float32. It begins as the plain mean of the weights so
    far: the decay of update n, counted from 0, is min(decay ** EVERY, n / (n + 1)).

    Attributes:
        averages: one for each weight.
        steps: steps taken.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """`weights`: by the names that their averages have in a checkpoint (see
        `ShardedTensors`)."""
        self.averages = [weight.detach().float().clone() for weight in weights.values()]
        self.steps = 0
        self._names = list(weights)
        self._weights = list(weights.values())
        self._decay = decay

    @torch.no_grad()
    def step(self) -> None:
        """After a step of the optimizers."""
        self.steps += 1
        if self.steps % EVERY == 0:
            before = self.steps // EVERY - 1
            decay = min(self._decay**EVERY, before / (before + 1))
            for average, weight in zip(self.averages, self._weights, strict=True):
                average.lerp_(weight.float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the weights hold their averages."""
        own = [weight.detach().clone() for weight in self._weights]
        self._fill(self.averages)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: Sequence[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint, by the weights' names."""
        return dict(zip(self._names, map(cpu_copy, self.averages), strict=True)) | {
            "average_steps": torch.tensor(self.steps)
        }

    def restore(self, parts: ShardedTensors) -> None:
        """From `state()`, of any number of workers."""
        for name, average in zip(self._names, self.averages, strict=True):
            name, _, first = name.rpartition("@")
            average.copy_(parts.slice(name, int(first), len(average)))
        self.steps = int(parts["average_steps"])
