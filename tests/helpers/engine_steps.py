"""Functions for the engine's workers: a trainer of one arm that learns global batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from example import SCHEMA, make_rows

from exfm_ray.config.arms import Arm, Objective
from exfm_ray.config.distillation import DistillationConfig
from exfm_ray.config.models import MLPConfig, ModelConfig, WukongConfig
from exfm_ray.config.trainer import VMConfig
from exfm_ray.data.stream import list_values
from exfm_ray.stores.supervision import TEACHER_COLUMN

WUKONG = WukongConfig(dim=4, l=1, n_F=2, n_L=2, k=2, fmb_mlp=(8,), mlp=(8,))
MLP = MLPConfig(dim=4, mlp=(8,))
SEED = 3


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        trainer: its settings.
        arm: None for the FM.
        batches: sizes of the global batches.
        supervised_from: the first batch that has supervision.
        model: the student's model.
        tasks: of a VM.
    """

    trainer: dict[str, Any] = field(default_factory=dict)
    arm: Objective | None = Objective.LABELS
    batches: tuple[int, ...] = (64, 64, 64, 64, 64, 33, 1)
    supervised_from: int = 0
    model: ModelConfig = MLP
    tasks: tuple[int, ...] = (0,)


def global_batches(case: Case) -> list[pa.Table]:
    """Return the case's batches; the teacher's predictions for both tasks are noisy labels."""
    rows = make_rows(sum(case.batches), seed=7)
    labels = list_values(rows["labels"], len(SCHEMA.tasks))
    p = (0.2 + 0.5 * labels + 0.1 * np.random.default_rng(1).random(labels.shape)).astype(
        np.float32
    )
    augmented = rows.append_column(
        TEACHER_COLUMN, pa.FixedSizeListArray.from_arrays(pa.array(p.ravel()), len(SCHEMA.tasks))
    )
    starts = np.cumsum((0, *case.batches))
    pieces = [
        (augmented if i >= case.supervised_from else rows).slice(s, n)
        for i, (s, n) in enumerate(zip(starts, case.batches, strict=False))
    ]
    return pieces


def make_group(case: Case) -> Any:
    """Return a group of one trainer: the FM (arm None, both tasks) or a vertical model."""
    from exfm_ray.distillation.adapter import Adapter
    from exfm_ray.distillation.objective import Weights
    from exfm_ray.distillation.student import Student
    from exfm_ray.engine.engine import Engine
    from exfm_ray.engine.replica import ReplicatedModule
    from exfm_ray.models.network import build_network
    from exfm_ray.training.group import BatchGroup
    from exfm_ray.training.model_trainer import ModelTrainer

    config = VMConfig(**case.trainer)
    distillation = DistillationConfig()
    tasks = (0, 1) if case.arm is None else case.tasks
    device = torch.device("cpu")
    student = Student(
        build_network(case.model, SCHEMA, len(tasks), SEED),
        case.arm or Objective.LABELS,
        distillation,
        SEED,
    )
    engine = Engine(SCHEMA, config, student, case.model, SEED, device)
    adapter = (
        ReplicatedModule(Adapter(distillation.sa, len(tasks), SEED), distillation.sa.lr, device)
        if case.arm is Objective.AH_SA
        else None
    )
    trainer = ModelTrainer(
        "m",
        Arm(case.arm) if case.arm else None,
        tasks,
        engine,
        Weights.from_config(distillation),
        adapter,
    )
    return BatchGroup(SCHEMA, [trainer], None, 64, device, tasks, len(SCHEMA.tasks))


def state(group: Any) -> dict[str, np.ndarray]:
    """Return all weights and the tables' momentum, gathered from all workers."""
    trainer = group.trainers[0]
    weights = {}
    for name, tensor in trainer.engine.dense_state().items():
        weights[f"dense/{name}"] = tensor.numpy()
    if trainer.adapter:
        for name, tensor in trainer.adapter.module.state_dict().items():
            weights[f"adapter/{name}"] = tensor.numpy().copy()
    return weights | whole(trainer.engine.tables)


def whole(tables: Any) -> dict[str, np.ndarray]:
    """Return all tables and their momentum, gathered from all workers."""
    local = [
        (s.table, s.first_row, s.weight_RW.numpy().copy(), s.momentum_R.numpy().copy())
        for s in tables.shards()
    ]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    shards = sorted((shard for part in gathered for shard in part), key=lambda shard: shard[:2])
    arrays = {}
    for table in SCHEMA.tables:
        of_table = [shard for shard in shards if shard[0] == table]
        weights = [weight for _, _, weight, _ in of_table]
        momenta = [momentum.reshape(-1) for _, _, _, momentum in of_table]
        arrays[f"tables/{table}"] = np.concatenate(weights)
        arrays[f"momentum/{table}"] = np.concatenate(momenta)
    return arrays


def train(case: Case) -> dict[str, np.ndarray]:
    """Learn all batches; return the state afterwards."""
    group = make_group(case)
    for rows in global_batches(case):
        group.learn(rows)
    return state(group)


def evaluate(case: Case, rows: int) -> dict[str, np.ndarray] | None:
    """Train, then predict new rows; return their groups and logits on rank 0, elsewhere None."""
    group = make_group(case)
    for batch in global_batches(case):
        group.learn(batch)
    result = group.gather([group.evaluate(make_rows(rows, seed=9))])
    return (
        None
        if result is None
        else {"logits": result.logits[group.trainers[0].name], "groups": result.group_N}
    )


def write_state(group: Any, folder: Path) -> None:
    """Write each worker's part of the trainer's state into a file."""
    from exfm_ray.training.async_checkpoint import write_part

    write_part(folder, dist.get_rank(), group.trainers[0].state())
    dist.barrier()


def saved_parts(folder: Path) -> Any:
    """Open what `write_state` wrote with any number of workers."""
    from exfm_ray.engine.tensor_store import ShardedTensors

    return ShardedTensors.open(sorted(folder.glob("*.safetensors")))


def resume(
    case: Case,
    folder: Path,
    cut: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the state after learning without a break, and after a checkpoint at batch `cut` that a
    new trainer resumes."""
    batches = global_batches(case)
    straight = make_group(case)
    fresh = make_group(case)
    for rows in batches[:cut]:
        straight.learn(rows)
    write_state(straight, folder)
    fresh.trainers[0].restore(saved_parts(folder))
    for rows in batches[cut:]:
        straight.learn(rows)
        fresh.learn(rows)
    return state(straight), state(fresh)


def save_at(
    case: Case,
    folder: Path,
    cut: int,
) -> dict[str, np.ndarray]:
    """Learn `cut` batches and save; return the state."""
    group = make_group(case)
    for rows in global_batches(case)[:cut]:
        group.learn(rows)
    write_state(group, folder)
    return state(group)


def go_on(
    case: Case,
    folder: Path,
    cut: int,
    restored: bool = False,
) -> dict[str, np.ndarray]:
    """Resume what `save_at` wrote; return the final state, or the restored one if `restored`."""
    group = make_group(case)
    group.trainers[0].restore(saved_parts(folder))
    if not restored:
        for rows in global_batches(case)[cut:]:
            group.learn(rows)
    return state(group)


def embed(
    sharding: str,
    model: ModelConfig,
    sizes: Sequence[int],
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Return the embedded rows of sharded tables for batches of equal length on every worker, and
    the tables after a step on `some_loss` of the last batch."""
    from exfm_ray.data.batch import to_batch
    from exfm_ray.engine.tables import ShardedTables

    tables = ShardedTables(SCHEMA, VMConfig(sharding=sharding), model, SEED, torch.device("cpu"))
    embedded = [
        tables(to_batch(make_rows(size, seed=size + dist.get_rank()), SCHEMA)) for size in sizes
    ]
    some_loss(embedded[-1]).backward()
    return [tensor.detach().numpy() for tensor in embedded], whole(tables)


def some_loss(embedded_BRE: torch.Tensor) -> torch.Tensor:
    """Return a weighted sum whose gradient differs at every position."""
    return (embedded_BRE * torch.arange(embedded_BRE.numel()).cos().view_as(embedded_BRE)).sum()
