"""Looks for losses and weights that are not numbers; for losses without waiting for the device at
every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from exfm_ray.errors import UserError
from exfm_ray.training.checkpoint import Checkpoints
from exfm_ray.training.loop import Loop
from exfm_ray.training.model_trainer import LOSSES_KEPT

NONE = 2**62


class FiniteCheck:
    """Checks the losses of all lanes every `LOSSES_KEPT` batches, and whenever it is asked to; all
    workers call it in step."""

    def __init__(
        self,
        loop: Loop,
        checkpoints: Checkpoints,
        section: str,
    ) -> None:
        """`section`: of the config, whose rates the user may lower."""
        self._loop = loop
        self._checkpoints = checkpoints
        self._section = section
        self._learnt: list[
            tuple[int, int, int]
        ] = []  # window, batch and group of the batches since the last check

    def observe(
        self,
        window: int,
        batch: int,
        group: int,
    ) -> None:
        """A batch of a group was learnt."""
        self._learnt.append((window, batch, group))
        if len(self._learnt) == LOSSES_KEPT:
            self.check()

    def check(self) -> None:
        """UserError that names the first batch since the last check whose loss is not a number, on
        any worker."""
        lanes = [
            (number, lane) for number, group in enumerate(self._loop.groups) for lane in group.lanes
        ]
        first = NONE
        for code, (number, lane) in enumerate(lanes):
            bad = lane.first_bad_loss()
            if bad is not None:
                own = [
                    position
                    for position, (_, _, group) in enumerate(self._learnt)
                    if group == number
                ]
                first = min(first, own[bad] * len(lanes) + code)
        if dist.get_world_size() > 1:
            found = torch.tensor(first)
            dist.all_reduce(found, dist.ReduceOp.MIN)
            first = int(found)
        if first != NONE:
            position, code = divmod(first, len(lanes))
            window, batch, _ = self._learnt[position]
            self._stop(window, batch, lanes[code][1].name)
        self._learnt = []

    def _stop(
        self,
        window: int,
        batch: int,
        lane: str,
    ) -> None:
        raise UserError(
            f"window {window}, batch {batch}: the loss of '{lane}' is not a number, training stops; {self._checkpoints.last_good()}. "
            f"Lower {self._section}.optimizer's learning rates under another --name"
        )

    def check_weights(
        self,
        when: str,
        lane: str,
        weights: Mapping[str, Tensor],
    ) -> None:
        """UserError, on all workers, where one of a lane's weights that are about to be stored is
        not finite on any of them."""
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, not_finite(weights))
        bad = next((name for name in found if name), None)
        if bad:
            raise UserError(
                f"{when}: '{bad}' of '{lane}' is not finite, the model has diverged, so it is not stored; {self._checkpoints.last_good()}. "
                f"Lower {self._section}.optimizer's learning rates under another --name"
            )


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; None without any."""
    for name, tensor in tensors.items():
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not torch.isfinite(torch.stack(tensor.aminmax())).all()
        ):
            return name
    return None
