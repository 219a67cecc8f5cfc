"""Training on several workers equals training on one, training in plain torch, and itself after a
checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import engine_steps as steps
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_steps import Case
from example import SCHEMA
from torch import Tensor, nn
from workers import Workers

from exfm_ray.config.arms import Objective
from exfm_ray.config.distillation import DistillationConfig, SAConfig
from exfm_ray.data.batch import to_batch
from exfm_ray.data.stream import list_values
from exfm_ray.distillation.adapter import Adapter
from exfm_ray.distillation.objective import labels_objective_B
from exfm_ray.distillation.student import Logits, Student
from exfm_ray.engine.tables import ADAGRAD_EPS
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.network import build_network
from exfm_ray.stores.supervision import TEACHER_COLUMN

ZERO = [0, 1, 2, 3]
# float32 sums in another order differ; Adam's division by the root of a tiny second moment enlarges
# the differences to about 1e-5 in 7 steps.
TOLERANCE = {"rtol": 1e-3, "atol": 2e-5}


def assert_close(
    actual: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    **tolerance: float,
) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], err_msg=name, **tolerance)


def assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@pytest.mark.parametrize("stage", ZERO)
@pytest.mark.parametrize(
    ("arm", "tasks"), [(None, (0, 1)), (Objective.AH_SA, (0,)), (Objective.AH_SA, (1, 0))]
)
def test_two_workers_equal_one(
    groups: dict[int, Workers],
    stage: int,
    arm: Objective | None,
    tasks: tuple[int, ...],
) -> None:
    """Wrong: the gradient is not the mean over the global batch (a short last batch, or a worker
    without a row, counts wrongly), or a ZeRO stage changes the result."""
    model = steps.WUKONG if arm is None else steps.MLP
    one = groups[1].run(steps.train, Case(arm=arm, model=model, tasks=tasks))[0]
    two = groups[2].run(
        steps.train, Case(trainer={"zero_stage": stage}, arm=arm, model=model, tasks=tasks)
    )
    assert_equal(two[0], two[1])
    assert_close(two[0], one, **TOLERANCE)


@pytest.mark.parametrize("world", [1, 2])
def test_table_wise_equals_row_wise(groups: dict[int, Workers], world: int) -> None:
    """Wrong: the sharding changes what is learned."""
    row, table = (
        groups[world].run(steps.train, Case(trainer={"sharding": sharding}))[0]
        for sharding in ("row_wise", "table_wise")
    )
    assert_close(table, row, **TOLERANCE)


Loss = Callable[[Logits, Tensor, Tensor], Tensor]
"""Loss of the logits, the labels and the teacher's predictions for all tasks of the stream."""


def plain_torch(
    case: Case,
    loss: Loss,
    adapter: nn.Module,
) -> dict[str, np.ndarray]:
    """Do the same training with autograd, AdamW and the formula of row-wise Adagrad."""
    tables = LocalTables(SCHEMA, case.model, steps.SEED)
    network = build_network(case.model, SCHEMA, 2, steps.SEED)
    student = Student(network, case.arm or Objective.LABELS, DistillationConfig(), steps.SEED)
    adam = torch.optim.AdamW(
        [
            {"params": student.parameters(), "weight_decay": 0.01},
            {"params": adapter.parameters(), "weight_decay": 0},
        ],
        lr=1e-3,
    )
    momentum = torch.zeros(len(tables.weight))
    for rows in steps.global_batches(case):
        batch = to_batch(rows, SCHEMA)
        tables.weight.grad = None
        adam.zero_grad()
        teacher = torch.tensor(list_values(rows[TEACHER_COLUMN], 2))
        loss(student(tables(batch), batch.dense_BD), batch.labels_BT, teacher).backward()
        adam.step()
        gradient = tables.weight.grad
        assert gradient is not None
        momentum += gradient.square().mean(dim=1)
        with torch.no_grad():
            tables.weight -= 0.05 * gradient / (momentum.sqrt() + ADAGRAD_EPS)[:, None]
    first = tables.first_row
    actual = {
        f"dense/{name}": tensor.detach().numpy() for name, tensor in student.state_dict().items()
    }
    actual |= {f"adapter/{name}": tensor.numpy() for name, tensor in adapter.state_dict().items()}
    for name, table in tables.tables().items():
        actual[f"tables/{name}"] = table.numpy()
        actual[f"momentum/{name}"] = momentum[first[name] : first[name] + tables.rows[name]].numpy()
    return actual


OPTIMIZER = {"optimizer": {"table_lr": 0.05, "dense_lr": 1e-3, "dense_weight_decay": 0.01}}


def test_learns_what_plain_torch_learns(groups: dict[int, Workers]) -> None:
    """Wrong: the tables do not change, or the optimizers are not row-wise Adagrad and AdamW at the
    configured rates."""
    case = Case(trainer=OPTIMIZER, arm=None, batches=(64, 64, 64), model=steps.MLP)
    actual = groups[1].run(steps.train, case)[0]
    fresh = LocalTables(SCHEMA, case.model, steps.SEED).tables()
    for name in SCHEMA.tables:
        assert (actual[f"momentum/{name}"] > 0).any(), name
        assert not np.array_equal(actual[f"tables/{name}"], fresh[name].numpy()), name
    expected = plain_torch(
        case,
        lambda logits, labels, _: labels_objective_B(logits.serving_BT, labels).mean(),
        nn.Module(),
    )
    assert_close(actual, expected, **TOLERANCE)


def test_two_tasks_learn_what_plain_torch_learns(groups: dict[int, Workers]) -> None:
    """Wrong: a task learns the labels, predictions or adapter targets of another task, or the
    adapter's target contains its labels."""
    case = Case(trainer=OPTIMIZER, arm=Objective.AH_SA, batches=(64, 64, 64), tasks=(1, 0))
    mlps = Adapter(SAConfig(), 2, steps.SEED).mlps

    def loss(
        logits: Logits,
        labels: Tensor,
        teacher: Tensor,
    ) -> Tensor:
        total = torch.zeros(())
        for output, task in enumerate(case.tasks):
            z_s, z_d, z_a = (logit[:, output] for logit in logits)
            y = labels[:, task]
            p = teacher[:, task]
            z = torch.logit(teacher[:, task])
            adapted = z + mlps[output](z[:, None])[:, 0]
            targets = {z_s: y, z_d: p, z_a: adapted.detach().sigmoid(), adapted: y}
            total = total + sum(
                F.binary_cross_entropy_with_logits(z, target) for z, target in targets.items()
            ) / len(case.tasks)
        return total

    expected = plain_torch(case, loss, nn.ModuleDict({"mlps": mlps}))
    assert_close(groups[1].run(steps.train, case)[0], expected, **TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("world", "stage"), [(1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_resumes_from_a_checkpoint_bit_by_bit(
    groups: dict[int, Workers],
    tmp_path: Path,
    world: int,
    stage: int,
    precision: str,
) -> None:
    """Wrong: a part of the state is missing in a checkpoint (a moment, bf16's float32 weights, the
    tables' momentum, the adapter, its optimizer, the moving average)."""
    optimizer = {} if stage == 3 else {"ema": 0.9}
    case = Case(
        trainer={"zero_stage": stage, "precision": precision, "optimizer": optimizer},
        arm=Objective.AH_SA,
        tasks=(1, 0),
    )
    for straight, resumed in groups[world].run(steps.resume, case, tmp_path, 4):
        assert_equal(resumed, straight)


LAYOUTS = [
    (1, {"zero_stage": 0}),
    (2, {"zero_stage": 1}),
    (2, {"zero_stage": 2, "sharding": "table_wise"}),
    (2, {"zero_stage": 3}),
]


@pytest.mark.parametrize(
    ("saved", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")],
)
def test_resumes_with_other_workers_stages_and_sharding(
    groups: dict[int, Workers],
    tmp_path: Path,
    saved: int,
    precision: str,
) -> None:
    """Wrong: a table, a moment or a weight that was split in another way is read from the wrong
    position, or a part of it is lost."""
    cases = [
        Case(trainer={**trainer, "precision": precision}, arm=Objective.AH_SA, tasks=(1, 0))
        for _, trainer in LAYOUTS
    ]
    before = groups[LAYOUTS[saved][0]].run(steps.save_at, cases[saved], tmp_path, 4)[0]
    straight = groups[1].run(steps.train, cases[0])[0]
    for (world, _), case in zip(LAYOUTS, cases, strict=True):
        assert_equal(groups[world].run(steps.go_on, case, tmp_path, 4, True)[0], before)
        if precision == "fp32":
            assert_close(
                groups[world].run(steps.go_on, case, tmp_path, 4)[0], straight, **TOLERANCE
            )


@pytest.mark.parametrize("arm", [Objective.AH, Objective.AH_SA])
@pytest.mark.parametrize("stage", ZERO)
def test_heads_without_a_gradient(
    groups: dict[int, Workers],
    stage: int,
    arm: Objective,
) -> None:
    """Wrong: the first windows, which have no supervision, fail or change the heads that have no
    targets yet; or the ZeRO stages disagree after supervision begins."""
    untaught = Case(trainer={"zero_stage": stage}, arm=arm, supervised_from=99)
    fresh = groups[1].run(steps.train, Case(arm=arm, batches=()))[0]
    actual = groups[2].run(steps.train, untaught)[0]
    heads = [name for name in fresh if "auxiliary_head" in name or "adapter" in name]
    assert heads
    for name in heads:
        np.testing.assert_array_equal(actual[name], fresh[name], err_msg=name)
    later = Case(trainer={"zero_stage": stage}, arm=arm, supervised_from=4)
    one = groups[1].run(steps.train, Case(arm=arm, supervised_from=4))[0]
    assert_close(groups[2].run(steps.train, later)[0], one, **TOLERANCE)


@pytest.mark.parametrize("rows", [1, 101])
def test_evaluation_is_complete_on_rank_0(groups: dict[int, Workers], rows: int) -> None:
    """Wrong: evaluation drops or repeats rows if they cannot be divided evenly, or includes a
    worker's padding."""
    one = groups[1].run(steps.evaluate, Case(), rows)[0]
    two, nothing = groups[2].run(steps.evaluate, Case(), rows)
    assert nothing is None
    np.testing.assert_array_equal(two["groups"], one["groups"])
    np.testing.assert_allclose(two["logits"], one["logits"], **TOLERANCE)


def test_bf16_learns(groups: dict[int, Workers]) -> None:
    """Wrong: bf16 fails, or is so coarse that training takes another course."""
    case = Case(arm=Objective.AH)
    exact, coarse = (
        groups[1].run(steps.train, Case(trainer={"precision": p}, arm=Objective.AH))[0]
        for p in ("fp32", "bf16")
    )
    assert case.batches
    for name in exact:
        # bf16 has 8 bits: 0.4% of a value. Gradients of one sign make Adam and Adagrad step by lr
        # in any precision.
        np.testing.assert_allclose(coarse[name], exact[name], atol=0.05, rtol=0.1, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_compiled_learns_the_same(groups: dict[int, Workers], stage: int) -> None:
    """Wrong: torch.compile changes what is learned under DeepSpeed, or stops learning. Slow: it
    compiles C++."""
    eager = Case(trainer={"zero_stage": stage}, arm=None, model=steps.WUKONG, batches=(64, 64, 64))
    compiled = Case(
        trainer={"zero_stage": stage, "compile": True},
        arm=None,
        model=steps.WUKONG,
        batches=(64, 64, 64),
    )
    assert_close(
        groups[1].run(steps.train, compiled)[0], groups[1].run(steps.train, eager)[0], **TOLERANCE
    )
