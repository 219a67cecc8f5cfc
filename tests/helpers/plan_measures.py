"""Measurements by the engine's workers: the bytes of the tensors that a real training holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from example import make_rows
from torch import Tensor

from exfm_ray.config.arms import Objective
from exfm_ray.config.distillation import DistillationConfig
from exfm_ray.config.trainer import FMConfig
from exfm_ray.schema import Schema


def nbytes(tensors: Iterable[Tensor], excluded: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the tensors' storages, each counted once, without the excluded ones."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    for tensor in excluded:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def measure(fm: FMConfig, schema: Schema) -> dict[str, Any]:
    """Train the FM on one batch; return this worker's bytes by kind and the rows of its shards."""
    from exfm_ray.data.batch import to_batch
    from exfm_ray.distillation.student import Student
    from exfm_ray.engine.engine import Engine
    from exfm_ray.models.network import build_network

    network = build_network(fm.model, schema, len(schema.tasks), seed=1)
    engine = Engine(
        schema,
        fm,
        Student(network, Objective.LABELS, DistillationConfig(), 1),
        fm.model,
        1,
        torch.device("cpu"),
    )
    batch = to_batch(
        make_rows(fm.batch_size // fm.workers, seed=dist.get_rank(), schema=schema), schema
    )
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    dtype = torch.bfloat16 if fm.precision == "bf16" else torch.float32
    embedded_BRE = engine.tables(batch).to(dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = engine.dense(embedded_BRE, batch.dense_BD.to(dtype))
    module = engine.dense.module
    activations = nbytes(saved, excluded=module.parameters())
    engine.dense.backward(logits.serving_BT.square().mean())
    gradients = nbytes(p.grad for p in module.parameters() if p.grad is not None)
    engine.dense.step()

    optimizer = getattr(engine.dense.optimizer, "optimizer", engine.dense.optimizer)
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()]
    groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # Stage 3 has its float32 weights elsewhere between two steps.
    stepped = getattr(engine.dense.optimizer, "fp32_partitioned_groups_flat", groups)
    shards = list(engine.tables.shards())
    return {
        "tables": sum(shard.weight_RW.nbytes for shard in shards),
        "row-wise Adagrad": sum(shard.momentum_R.nbytes for shard in shards),
        "dense weights": nbytes(weights),
        "float32 masters": nbytes(stepped, excluded=weights),
        "Adam": nbytes(
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ),
        "moving average": nbytes(engine._average.averages) if engine._average else 0,
        "activations": activations,
        "gradients": gradients,
        "rows": {shard.table: len(shard.weight_RW) for shard in shards if len(shard.weight_RW)},
    }
