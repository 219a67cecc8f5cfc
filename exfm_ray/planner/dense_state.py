"""Bytes of the dense part in DeepSpeed 0.19 with torch's AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from exfm_ray.config.trainer import FMConfig
from exfm_ray.planner.table_placement import FLOAT_BYTES

REDUCE_BUCKET = 500_000_000
"""Numbers in DeepSpeed's default reduce bucket.

On a GPU it is allocated as a whole; a CPU's memory holds only the part that is written.
"""
MAX_LIVE_PARAMETERS = 1_000_000_000
"""Most gathered weights that ZeRO stage 3 keeps by default (stage3_max_live_parameters)."""


@dataclass(frozen=True)
class DenseState:
    """Bytes of the dense part on each worker.

    Attributes:
        parameters: number of parameters of the whole network.
        weights: resident weights in the training's precision.
        masters: resident float32 copies that DeepSpeed updates; none in stage 0 with fp32.
        adam: resident moments of Adam.
        gradients: largest amount in a step: gradients and the buffers that reduce them.
        gathered: whole weights that ZeRO stage 3 gathers in a step.
    """

    parameters: int
    weights: int
    masters: int
    adam: int
    gradients: int
    gathered: int


def dense_state(network: nn.Module, fm: FMConfig) -> DenseState:
    """Calculate the dense part's bytes on each worker for `fm.zero_stage` and `fm.precision`."""
    sizes = [parameter.numel() for parameter in network.parameters()]
    total = sum(sizes)
    if fm.zero_stage == 0:
        return _replicated(total, fm)
    if fm.zero_stage < 3:
        return _partitioned_optimizer(total, fm)
    return _partitioned_weights(sizes, fm)


def _weight_bytes(fm: FMConfig) -> int:
    if fm.precision == "bf16":
        return 2
    return FLOAT_BYTES


def _bucket_bytes(total: int, fm: FMConfig) -> int:
    numbers = REDUCE_BUCKET
    if fm.device == "cpu":
        numbers = min(total, REDUCE_BUCKET)
    return numbers * _weight_bytes(fm)


def _replicated(total: int, fm: FMConfig) -> DenseState:
    """Stage 0: every worker holds everything."""
    weights = _weight_bytes(fm) * total
    masters = 0
    reduce_buffer = 0
    if fm.precision == "bf16":
        masters = FLOAT_BYTES * total
        reduce_buffer = FLOAT_BYTES * total
    elif fm.workers > 1:
        reduce_buffer = FLOAT_BYTES * min(total, REDUCE_BUCKET)
    return DenseState(
        parameters=total,
        weights=weights,
        masters=masters,
        adam=2 * FLOAT_BYTES * total,
        gradients=weights + reduce_buffer,
        gathered=0,
    )


def _partitioned_optimizer(total: int, fm: FMConfig) -> DenseState:
    """Stages 1 and 2: whole weights; their flat buffer is padded to two numbers per worker."""
    partition = 2 * -(-total // (2 * fm.workers))
    masters = FLOAT_BYTES * partition
    gradient_partition = _weight_bytes(fm) * partition
    return DenseState(
        parameters=total,
        weights=gradient_partition * fm.workers,
        masters=masters,
        adam=2 * masters,
        gradients=gradient_partition + max(_bucket_bytes(total, fm), masters),
        gathered=0,
    )


def _partitioned_weights(sizes: Sequence[int], fm: FMConfig) -> DenseState:
    """Stage 3: every parameter is split over the workers."""
    total = sum(sizes)
    partition = sum(-(-size // fm.workers) for size in sizes)
    weights = _weight_bytes(fm) * partition
    masters = FLOAT_BYTES * partition
    gathered = 0
    if fm.workers > 1:
        gathered = _weight_bytes(fm) * min(total, MAX_LIVE_PARAMETERS)
    return DenseState(
        parameters=total,
        weights=weights,
        masters=masters,
        adam=2 * masters,
        gradients=weights + _bucket_bytes(total, fm) + masters,
        gathered=gathered,
    )
