"""Checks losses and weights for values that are not finite.

Losses are checked every few batches only, because each check waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from exfm_ray.errors import UserError
from exfm_ray.training.checkpoint import Checkpoints
from exfm_ray.training.loop import Loop
from exfm_ray.training.model_trainer import LOSSES_KEPT

ALL_FINITE = 2**62


class _Step(NamedTuple):
    """A batch that a group has learned."""

    window: int
    batch: int
    group: int


class FiniteCheck:
    """Checks the losses of all trainers every `LOSSES_KEPT` batches, and on request.

    All workers call its methods in step.
    """

    def __init__(
        self,
        loop: Loop,
        checkpoints: Checkpoints,
        section: str,
    ) -> None:
        """`section` of the config has the learning rates that the user may lower."""
        self._loop = loop
        self._checkpoints = checkpoints
        self._section = section
        self._steps: list[_Step] = []  # since the last check

    def observe(
        self,
        window: int,
        batch: int,
        group: int,
    ) -> None:
        """Note that a group has learned a batch."""
        self._steps.append(_Step(window, batch, group))
        if len(self._steps) == LOSSES_KEPT:
            self.check()

    def check(self) -> None:
        """Raise a UserError if a loss since the last check is not finite on any worker.

        It names the first such batch.
        """
        names = [trainer.name for trainer in self._loop.trainers]
        first_code = self._first_bad_code()
        if dist.get_world_size() > 1:
            code = torch.tensor(first_code)
            dist.all_reduce(code, dist.ReduceOp.MIN)
            first_code = int(code)
        if first_code != ALL_FINITE:
            position, trainer = divmod(first_code, len(names))
            step = self._steps[position]
            raise UserError(
                f"window {step.window}, batch {step.batch}: the loss of '{names[trainer]}' is not "
                f"a number, training stops; {self._checkpoints.last_good()}. {self._remedy()}"
            )
        self._steps = []

    def _first_bad_code(self) -> int:
        """This worker's first bad loss, as a number that orders by step, then by trainer.

        It is (position of the step) * (number of trainers) + (number of the trainer), or
        `ALL_FINITE`.
        """
        trainer_count = len(self._loop.trainers)
        first_code = ALL_FINITE
        number = 0
        for position, group in enumerate(self._loop.groups):
            group_steps = [i for i, step in enumerate(self._steps) if step.group == position]
            for trainer in group.trainers:
                bad = trainer.first_bad_loss()
                if bad is not None:
                    first_code = min(first_code, group_steps[bad] * trainer_count + number)
                number += 1
        return first_code

    def check_weights(
        self,
        when: str,
        trainer: str,
        weights: Mapping[str, Tensor],
    ) -> None:
        """Raise a UserError, on all workers, if a weight to be stored is not finite on any."""
        bad_names: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(bad_names, not_finite(weights))
        bad_name = next((name for name in bad_names if name), None)
        if bad_name:
            raise UserError(
                f"{when}: '{bad_name}' of '{trainer}' is not finite, the model has diverged, "
                f"so it is not stored; {self._checkpoints.last_good()}. {self._remedy()}"
            )

    def _remedy(self) -> str:
        return f"Lower {self._section}.optimizer's learning rates under another --name"


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; None without any."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        extremes = torch.stack(tensor.aminmax())
        if not torch.isfinite(extremes).all():
            return name
    return None
