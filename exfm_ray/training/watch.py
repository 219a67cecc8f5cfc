"""Looks for losses that are not numbers, without waiting for the device at every step."""

from __future__ import annotations

import torch
import torch.distributed as dist

from exfm_ray.errors import UserError
from exfm_ray.training.checkpoint import Checkpoints
from exfm_ray.training.lane import LOSSES_KEPT
from exfm_ray.training.loop import Loop

NONE = 2**62


class LossWatch:
    """Checks the losses of all lanes every `LOSSES_KEPT` batches, and whenever it is asked to; all workers call it in step."""

    def __init__(self, loop: Loop, checkpoints: Checkpoints, section: str) -> None:
        """`section`: of the config, whose rates the user may lower."""
        self._loop, self._checkpoints, self._section = loop, checkpoints, section
        self._learnt: list[tuple[int, int, int]] = []  # window, batch and group of the batches since the last check

    def after(self, window: int, batch: int, group: int) -> None:
        """A batch of a group was learnt."""
        self._learnt.append((window, batch, group))
        if len(self._learnt) == LOSSES_KEPT:
            self.check()

    def check(self) -> None:
        """UserError that names the first batch since the last check whose loss is not a number, on any worker."""
        lanes = [(number, lane) for number, group in enumerate(self._loop.groups) for lane in group.lanes]
        first = NONE
        for code, (number, lane) in enumerate(lanes):
            bad = lane.first_bad_loss()
            if bad is not None:
                own = [position for position, (_, _, group) in enumerate(self._learnt) if group == number]
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

    def _stop(self, window: int, batch: int, lane: str) -> None:
        committed = self._checkpoints.committed()
        good = f"the last good state is {committed[-1]}" if committed else "there is no checkpoint before it"
        raise UserError(
            f"window {window}, batch {batch}: the loss of '{lane}' is not a number, training stops; {good}. "
            f"Lower {self._section}.optimizer's learning rates under another --name"
        )
