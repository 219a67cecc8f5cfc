"""The state of a training loop as named tensors, as a checkpoint stores it.

lanes/<trainer>/...        what this worker holds of tables, dense parts, optimizers, averages and
                           the adapter
random/<rank>/cpu, cuda    its random state
uses/<model>/...           how often table rows were used, where arms with +share need it (worker 0)
usage/<model>/...          when table rows were last used, where unused ones are reset (worker 0)
metrics/<key as JSON>/...  metric states (worker 0)

Every worker stores its own part. Tensors that are spread over workers are named as
`engine.tensor_store` reads them, so any number of workers can restore them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from exfm_ray.engine.tensor_store import ShardedTensors, cpu_copy
from exfm_ray.metrics.state import MetricState
from exfm_ray.training.loop import Loop
from exfm_ray.training.metric_rows import Key
from exfm_ray.training.row_usage import RowLastUse, RowUseCounts

if TYPE_CHECKING:  # importing it loads the engine, which takes seconds
    from exfm_ray.training.group import BatchGroup


def loop_state(loop: Loop) -> dict[str, Tensor]:
    """This worker's part of the state, copied to the CPU."""
    rank = dist.get_rank()
    state: dict[str, Tensor] = {}
    for trainer in loop.trainers:
        state |= _with_prefix(f"lanes/{trainer.name}", trainer.state())
    state[f"random/{rank}/cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state[f"random/{rank}/cuda"] = torch.cuda.get_rng_state()
    if rank != 0:
        return state

    for group in loop.groups:
        for prefix, usage in _row_usage(group):
            arrays = usage.state()
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            state |= _with_prefix(prefix, tensors)
    for key, metric in loop.states.items():
        metric_arrays = metric.to_arrays()
        tensors = {
            name: cpu_copy(torch.from_numpy(np.asarray(array)))
            for name, array in metric_arrays.items()
        }
        state |= _with_prefix(f"metrics/{json.dumps(key)}", tensors)
    return state


def restore_loop(
    loop: Loop,
    stored: ShardedTensors,
    workers: int,
) -> None:
    """Restore the union of what `loop_state` returned on each of `workers` workers."""
    for trainer in loop.trainers:
        trainer.restore(stored.with_prefix(f"lanes/{trainer.name}"))
    for group in loop.groups:
        for prefix, usage in _row_usage(group):
            tensors = stored.with_prefix(prefix)
            usage.restore({name: tensors[name].numpy() for name in tensors})

    random = stored.with_prefix(f"random/{dist.get_rank() % workers}")  # dropout draws from it
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    loop.states = metric_states(stored)


def metric_states(stored: ShardedTensors) -> dict[Key, MetricState]:
    """The metric states of a checkpoint."""
    arrays: dict[Key, dict[str, Any]] = {}
    metrics = stored.with_prefix("metrics")
    for name in metrics:
        key_text, _, part = name.rpartition("/")
        model, arm, domain, task = json.loads(key_text)
        parts = arrays.setdefault((model, arm, domain, task), {})
        parts[part] = metrics[name].numpy()
    return {key: MetricState.from_arrays(parts) for key, parts in arrays.items()}


def _row_usage(group: BatchGroup) -> Iterator[tuple[str, RowUseCounts | RowLastUse]]:
    """What a group notes of the use of table rows, with the prefix of its tensors' names."""
    model = group.trainers[0].model
    if group.sharing and group.sharing.uses:
        yield f"uses/{model}", group.sharing.uses
    if group.usage:
        yield f"usage/{model}", group.usage


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}
