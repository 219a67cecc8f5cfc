"""A small module that every worker holds whole, such as the student adapter."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from exfm_ray.engine.tensor_store import ShardedTensors, cpu_copy


class ReplicatedModule:
    """A module with its own Adam, equal on all workers because its gradients are averaged.

    It is meant for modules of a few hundred parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        device: torch.device,
    ) -> None:
        self.module = module.to(device)
        self._optimizer = torch.optim.Adam(self.module.parameters(), lr=lr, fused=True)

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the module's output."""
        return self.module(*inputs)

    def step(self) -> None:
        """Update the module with the last backward pass's gradients, averaged over the workers."""
        if dist.get_world_size() > 1:
            self._average_gradients()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _average_gradients(self) -> None:
        parameters = []
        gradients = []
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameters.append(parameter)
                gradients.append(parameter.grad.flatten())
        flat = torch.cat(gradients)
        dist.all_reduce(flat)
        mean = flat / dist.get_world_size()

        sizes = [parameter.numel() for parameter in parameters]
        for parameter, gradient in zip(parameters, torch.split(mean, sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def state(self) -> dict[str, Tensor]:
        """Return module and optimizer for a checkpoint, on the CPU; equal on every worker."""
        state = {}
        for name, parameter in self.module.named_parameters():
            state[f"{name}/weight"] = cpu_copy(parameter)
            optimizer_state = self._optimizer.state.get(parameter, {})
            for key, value in optimizer_state.items():
                state[f"{name}/{key}"] = cpu_copy(value)
        return state

    @torch.no_grad()
    def restore(self, tensors: ShardedTensors) -> None:
        """Restore what `state` returned."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(tensors[f"{name}/weight"])
            of_parameter = tensors.with_prefix(name)
            optimizer_state = {}
            for key in of_parameter:
                if key != "weight":
                    optimizer_state[key] = of_parameter[key].to(parameter.device)
            self._optimizer.state[parameter] = optimizer_state
