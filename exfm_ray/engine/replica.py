"""A tiny module that every worker holds whole: the student adapter, with an optimizer of its
own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from exfm_ray.engine.tensor_store import ShardedTensors, cpu_copy


class ReplicatedModule:
    """Keeps a module equal on all workers by averaging its gradients; for modules of a few hundred
    parameters."""

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        device: torch.device,
    ) -> None:
        self.module = module.to(device)
        self._optimizer = torch.optim.Adam(self.module.parameters(), lr=lr, fused=True)

    def __call__(self, *inputs: Tensor) -> Any:
        """The module's output."""
        return self.module(*inputs)

    def step(self) -> None:
        """One step on the gradients that the last backward pass left: their mean over the
        workers."""
        world = dist.get_world_size()
        if world > 1:
            parameters = [p for p in self.module.parameters() if p.grad is not None]
            flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            dist.all_reduce(flat)
            for parameter, part in zip(
                parameters, torch.split(flat / world, [p.numel() for p in parameters]), strict=True
            ):
                parameter.grad = part.view_as(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Module and optimizer for a checkpoint, copied to the CPU; the same on every worker."""
        state = {}
        for name, parameter in self.module.named_parameters():
            state[f"{name}/weight"] = cpu_copy(parameter)
            state |= {
                f"{name}/{key}": cpu_copy(value)
                for key, value in self._optimizer.state.get(parameter, {}).items()
            }
        return state

    @torch.no_grad()
    def restore(self, parts: ShardedTensors) -> None:
        """From `state()`."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(parts[f"{name}/weight"])
            own = parts.with_prefix(name)
            self._optimizer.state[parameter] = {
                key: own[key].to(parameter.device) for key in own if key != "weight"
            }
