"""A tiny module that every worker holds whole: the student adapter, with an optimizer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Replica:
    """Keeps a module equal on all workers by averaging its gradients; for modules of a few hundred parameters."""

    def __init__(self, module: nn.Module, lr: float, device: torch.device) -> None:
        self.module = module.to(device)
        self._optimizer = torch.optim.Adam(self.module.parameters(), lr=lr, fused=True)

    def __call__(self, *inputs: Tensor) -> Any:
        """The module's output."""
        return self.module(*inputs)

    def step(self) -> None:
        """One step on the gradients that the last backward pass left: their mean over the workers."""
        world = dist.get_world_size()
        if world > 1:
            parameters = [p for p in self.module.parameters() if p.grad is not None]
            flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            dist.all_reduce(flat)
            for parameter, part in zip(parameters, torch.split(flat / world, [p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def save(self, path: Path) -> None:
        """Write module and optimizer; one worker is enough."""
        torch.save({"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}, path)

    def load(self, path: Path) -> None:
        """Restore what `save` wrote."""
        state = torch.load(path, weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
