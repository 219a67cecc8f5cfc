"""Checkpoints of the dense part: float32 weights and Adam's moments, by parameter name.

They have the same form for every ZeRO stage, number of workers and precision, so they can be
restored with other settings. DeepSpeed's own checkpoints are pickles and would have to be converted
for that. Its `safe_get_*` and `safe_set_*` functions are not used: they do nothing at stage 0, do
not create the moments of an optimizer that has not stepped, do not reach Adam's step count, and at
stages 1 and 2 assemble every whole tensor on every worker.

DeepSpeed concatenates all parameters and splits the result over the workers (stages 1 and 2), or
splits each parameter (stage 3). `local_slices` maps a worker's part back to parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from exfm_ray.engine.tensor_store import ShardedTensors, cpu_copy

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the first and second moment in torch.optim.AdamW."""


class ParameterSlice(NamedTuple):
    """A range of a flattened parameter that this worker's optimizer updates.

    Attributes:
        name: of the parameter.
        start: index of the range's first number in the parameter.
        master: the optimizer's float32 tensor that contains the range.
        offset: index of the range's first number in `master`, flattened.
        numel: length of the range.
    """

    name: str
    start: int
    master: Tensor
    offset: int
    numel: int

    def view(self, tensor: Tensor) -> Tensor:
        """Return the range as a view of `master`, or of a moment of the same shape."""
        flat = tensor.detach().view(-1)
        end = self.offset + self.numel
        return flat[self.offset : end]


def local_slices(engine: Any) -> Iterator[ParameterSlice]:
    """Yield the ranges of this worker; without ZeRO every worker has every parameter whole."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return _stage_3_slices(engine)
    if stage:
        return _stage_1_or_2_slices(engine)
    return _whole_parameters(engine)


def _stage_3_slices(engine: Any) -> Iterator[ParameterSlice]:
    optimizer = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        start, numel = _stage_3_range(parameter)
        if numel > 0:
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            master = optimizer.fp32_partitioned_groups_flat[group]
            yield ParameterSlice(name, start, master, offset, numel)


def _stage_3_range(parameter: Any) -> tuple[int, int]:
    """Return start and length of this worker's range, without the last partition's padding."""
    partition_numel = parameter.ds_tensor.ds_numel
    start = dist.get_rank() * partition_numel
    numel = min(partition_numel, parameter.ds_numel - start)
    return start, numel


def _stage_1_or_2_slices(engine: Any) -> Iterator[ParameterSlice]:
    partitions = engine.optimizer.single_partition_of_fp32_groups
    for name, parameter in engine.module.named_parameters():
        mapping: Any = parameter._hp_mapping
        if mapping is None:
            continue
        start = mapping.lp_fragment_address.start
        address = mapping.hp_fragment_address
        master = partitions[mapping.param_group_index]
        yield ParameterSlice(name, start, master, address.start, address.numel)


def _whole_parameters(engine: Any) -> Iterator[ParameterSlice]:
    masters: dict[int, Tensor] = {}
    if engine.optimizer is not engine.basic_optimizer:  # bf16 has separate float32 weights
        groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        for low_precision, float32 in groups:
            for parameter, master in zip(low_precision, float32, strict=True):
                masters[id(parameter)] = master
    for name, parameter in engine.module.named_parameters():
        master = masters.get(id(parameter), parameter)
        yield ParameterSlice(name, 0, master, 0, parameter.numel())


def local_dense_state(engine: Any) -> dict[str, Tensor]:
    """Return this worker's part of a checkpoint, copied to the CPU.

    The names are those that `ShardedTensors` reads. Tensors that every worker holds whole are in
    rank 0's part only.
    """
    if dist.get_rank() and not engine.zero_optimization_stage():
        return {}

    states = engine.basic_optimizer.state
    tensors = {}
    for part in local_slices(engine):
        tensors[f"{part.name}/weight@{part.start}"] = cpu_copy(part.view(part.master))
        state = states.get(part.master)
        if not state:  # before the first step
            continue
        tensors[f"{part.name}/step"] = cpu_copy(state["step"])
        for moment in MOMENTS:
            values = part.view(state[moment])
            tensors[f"{part.name}/{moment}@{part.start}"] = cpu_copy(values)
    return tensors


@torch.no_grad()
def restore_dense_state(engine: Any, tensors: ShardedTensors) -> None:
    """Restore the dense part of a checkpoint; all workers must call this.

    The checkpoint may come from another number of workers and another ZeRO stage.
    """
    states = engine.basic_optimizer.state
    for part in local_slices(engine):
        weight = tensors.slice(f"{part.name}/weight", part.start, part.numel)
        part.view(part.master).copy_(weight)
        if f"{part.name}/step" in tensors:
            _restore_moments(part, states[part.master], tensors)
    _restore_model(engine, tensors)


def _restore_moments(
    part: ParameterSlice,
    state: dict[str, Tensor],
    tensors: ShardedTensors,
) -> None:
    master = part.master
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(master)

    # A partition with several parameters has one step count.
    step = torch.maximum(state["step"].cpu(), tensors[f"{part.name}/step"])
    state["step"].copy_(step)
    for moment in MOMENTS:
        values = tensors.slice(f"{part.name}/{moment}", part.start, part.numel)
        part.view(state[moment]).copy_(values)


def _restore_model(engine: Any, tensors: ShardedTensors) -> None:
    """Set the model's weights: the float32 weights, rounded to the model's precision."""
    module: nn.Module = engine.module
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()
        for name, parameter in module.named_parameters():
            _restore_stage_3_weight(name, parameter, tensors)
        engine.optimizer.checkpoint_event_epilogue()
        return
    for name, parameter in module.named_parameters():
        weight = tensors.slice(f"{name}/weight", 0, parameter.numel())
        parameter.data.view(-1).copy_(weight)


def _restore_stage_3_weight(
    name: str,
    parameter: Any,
    tensors: ShardedTensors,
) -> None:
    start, numel = _stage_3_range(parameter)
    if numel > 0:
        weight = tensors.slice(f"{name}/weight", start, numel)
        parameter.ds_tensor.data[:numel].copy_(weight)
