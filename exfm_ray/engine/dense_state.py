"""The dense part's float32 weights and Adam's moments, by parameter: the same at every stage of
ZeRO, in fp32 and bf16.

DeepSpeed lays the parameters end to end and cuts that into partitions, or cuts every parameter
(stage 3). Here each of them is found again by its name, so a checkpoint can be read with another
number of workers or at another stage. DeepSpeed's own checkpoints are pickles, and need a
conversion for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from exfm_ray.engine.tensor_store import ShardedTensors, cpu_copy

MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch.optim.AdamW's names of the first and second moment."""


class Piece(NamedTuple):
    """A stretch of a parameter, flattened, for which this worker's optimizer is responsible.

    Attributes:
        name: of the parameter.
        start: where the stretch begins in it.
        master: the optimizer's own tensor, float32.
        first, numel: where in `master`, flattened, the stretch lies.
    """

    name: str
    start: int
    master: Tensor
    first: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """The stretch of the master, or of a moment of its shape: a view."""
        return tensor.detach().view(-1)[self.first : self.first + self.numel]


def pieces(engine: Any) -> Iterator[Piece]:
    """All stretches of this worker; without ZeRO every worker has all of every parameter."""
    optimizer = engine.optimizer
    named: list[tuple[str, nn.Parameter]] = list(engine.module.named_parameters())
    if engine.zero_optimization_stage() == 3:
        for name, parameter in named:
            group, first, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank() * parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
            count = min(count, parameter.ds_numel - start)  # type: ignore[attr-defined]  # the last partition is filled up
            if count > 0:
                yield Piece(
                    name, start, optimizer.fp32_partitioned_groups_flat[group], first, count
                )
    elif engine.zero_optimization_stage():
        for name, parameter in named:
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                master = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                yield Piece(
                    name,
                    mapping.lp_fragment_address.start,
                    master,
                    *_address(mapping.hp_fragment_address),
                )
    else:
        masters = {id(parameter): parameter for _, parameter in named}
        if optimizer is not engine.basic_optimizer:  # bf16: float32 weights beside the model's
            for own, theirs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                masters |= {
                    id(parameter): master for parameter, master in zip(own, theirs, strict=True)
                }
        for name, parameter in named:
            yield Piece(name, 0, masters[id(parameter)], 0, parameter.numel())


def _address(address: Any) -> tuple[int, int]:
    return address.start, address.numel


def dense_parts(engine: Any) -> dict[str, Tensor]:
    """This worker's stretches for a checkpoint, copied to the CPU; names as in `ShardedTensors`.
    Whatever all workers hold is rank 0's to give."""
    if dist.get_rank() and not engine.zero_optimization_stage():
        return {}
    states = engine.basic_optimizer.state
    parts = {}
    for piece in pieces(engine):
        parts[f"{piece.name}/weight@{piece.start}"] = cpu_copy(piece.of(piece.master))
        state = states.get(piece.master)
        if state:  # none before the first step
            parts[f"{piece.name}/step"] = cpu_copy(state["step"])
            parts |= {
                f"{piece.name}/{moment}@{piece.start}": cpu_copy(piece.of(state[moment]))
                for moment in MOMENTS
            }
    return parts


@torch.no_grad()
def restore_dense(engine: Any, parts: ShardedTensors) -> None:
    """Put the dense part back into `engine`, whatever number of workers and stage of ZeRO it was
    saved with; all workers call it."""
    states = engine.basic_optimizer.state
    for piece in pieces(engine):
        piece.of(piece.master).copy_(parts.slice(f"{piece.name}/weight", piece.start, piece.numel))
        if f"{piece.name}/step" not in parts:
            continue
        state = states[piece.master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=piece.master.device)
            state |= {moment: torch.zeros_like(piece.master) for moment in MOMENTS}
        state["step"].copy_(
            torch.maximum(state["step"].cpu(), parts[f"{piece.name}/step"])
        )  # one for all of a partition
        for moment in MOMENTS:
            piece.of(state[moment]).copy_(
                parts.slice(f"{piece.name}/{moment}", piece.start, piece.numel)
            )
    _restore_model(engine, parts)


def _restore_model(engine: Any, parts: ShardedTensors) -> None:
    """The model's own weights, which are the float32 ones rounded to its precision."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()
        for name, parameter in engine.module.named_parameters():
            start = dist.get_rank() * parameter.ds_tensor.ds_numel
            count = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)
            if count > 0:
                parameter.ds_tensor.data[:count].copy_(parts.slice(f"{name}/weight", start, count))
        engine.optimizer.checkpoint_event_epilogue()
        return
    for name, parameter in engine.module.named_parameters():
        parameter.data.view(-1).copy_(parts.slice(f"{name}/weight", 0, parameter.numel()))
