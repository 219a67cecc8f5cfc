"""Each arm's loss against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exfm_ray.config.arms import Objective
from exfm_ray.config.distillation import AHConfig, DistillationConfig, KDConfig, SAConfig
from exfm_ray.data.labels.corrections import CORRECTED
from exfm_ray.distillation.objective import Weights, bce_BT, labels_objective_B, objective_B
from exfm_ray.distillation.student import Logits

WEIGHTS = Weights.from_config(
    DistillationConfig(
        kd=KDConfig(w=0.5), ah=AHConfig(w=0.25, alpha=3.0, beta=7.0), sa=SAConfig(w=2.0)
    )
)
LOGITS = Logits(
    torch.tensor([[0.3], [-2.0]]), torch.tensor([[1.1], [-0.4]]), torch.tensor([[-1.7], [0.6]])
)
LABELS = torch.tensor([[1.0], [0.0]])
TEACHER = torch.tensor([[0.2], [0.8]])
TARGET = torch.tensor([[0.35], [0.05]])


def h(z: float, y: float) -> float:
    p = 1 / (1 + math.exp(-z))
    return -y * math.log(p) - (1 - y) * math.log(1 - p)


# alpha = 3: the teacher's 0.2 becomes 0.6 and its 0.8 is clipped at 1. beta is no part of the
# objective.
EXPECTED = {
    Objective.LABELS: [h(0.3, 1), h(-2, 0)],
    Objective.KD: [h(0.3, 1) + 0.5 * h(0.3, 0.2), h(-2, 0) + 0.5 * h(-2, 0.8)],
    Objective.AH: [h(0.3, 1) + 0.25 * h(1.1, 0.6), h(-2, 0) + 0.25 * h(-0.4, 1.0)],
    Objective.AH_SA: [
        h(0.3, 1) + 0.25 * h(1.1, 0.6) + 2 * h(-1.7, 0.35),
        h(-2, 0) + 0.25 * h(-0.4, 1.0) + 2 * h(0.6, 0.05),
    ],
}


@pytest.mark.parametrize("arm", list(Objective))
def test_formula_of_each_arm(arm: Objective) -> None:
    """Wrong: a weight multiplies another term than its name says, alpha is not clipped, or heads
    are confused."""
    torch.testing.assert_close(
        objective_B(arm, WEIGHTS, LOGITS, LABELS, TEACHER, TARGET), torch.tensor(EXPECTED[arm])
    )


def some(
    rows: int,
    tasks: int,
    seed: int,
) -> tuple[Logits, Tensor, Tensor, Tensor]:
    """Random logits of all heads, labels, the teacher's probabilities and the adapter's targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(rows, tasks, generator=generator) for _ in range(3)]
    p, t, y = (torch.rand(rows, tasks, generator=generator) for _ in range(3))
    return Logits(*logits), (y < 0.3).float(), p, t


@pytest.mark.parametrize("arm", list(Objective))
def test_a_correction_takes_back_the_negative_that_was_learned(arm: Objective) -> None:
    """Wrong: an example learned as a 0 and corrected to a 1 differs from one learned as a 1 at
    once, or the label of another task moves."""
    logits, labels, teacher, target = some(40, 2, seed=3)
    wrong = labels.clone()
    correction = torch.full_like(labels, math.nan)
    wrong[:, 1], correction[:, 1], labels[:, 1] = 0, CORRECTED, 1

    def gradient(labels_BT: Tensor) -> Tensor:
        z = logits.serving_BT.clone().requires_grad_()
        objective_B(
            arm,
            WEIGHTS._replace(kd_w=0.0),
            logits._replace(serving_BT=z),
            labels_BT,
            teacher,
            target,
        ).sum().backward()
        assert z.grad is not None
        return z.grad

    torch.testing.assert_close(gradient(wrong) + gradient(correction), gradient(labels))
    assert not gradient(correction)[:, 0].any() and (gradient(correction)[:, 1] == -0.5).all(), (
        "-1 over two tasks"
    )


@pytest.mark.parametrize("arm", list(Objective))
@pytest.mark.parametrize("tasks", [2, 3])
def test_every_term_is_the_mean_over_the_tasks(arm: Objective, tasks: int) -> None:
    """Wrong: a task counts more than another, learns another's target, or the loss grows with the
    number of tasks."""
    logits, labels, teacher, target = some(200, tasks, seed=tasks)
    z_s, z_d, z_a, y, p, t = (x.double().numpy() for x in (*logits, labels, teacher, target))

    def term(z: np.ndarray, q: np.ndarray) -> np.ndarray:
        each = [
            -q[:, i] * np.log(1 / (1 + np.exp(-z[:, i])))
            - (1 - q[:, i]) * np.log(1 / (1 + np.exp(z[:, i])))
            for i in range(tasks)
        ]
        return sum(each) / tasks

    terms = {
        "labels": term(z_s, y),
        "kd": 0.5 * term(z_s, p),
        "ah": 0.25 * term(z_d, np.minimum(1, 3 * p)),
        "sa": 2 * term(z_a, t),
    }
    parts = {
        Objective.LABELS: ["labels"],
        Objective.KD: ["labels", "kd"],
        Objective.AH: ["labels", "ah"],
        Objective.AH_SA: ["labels", "ah", "sa"],
    }
    found = objective_B(arm, WEIGHTS, logits, labels, teacher, target)
    np.testing.assert_allclose(
        found.double().numpy(), sum(terms[part] for part in parts[arm]), rtol=1e-5
    )  # float32 against float64


@pytest.mark.parametrize("arm", list(Objective))
def test_one_task_is_the_plain_formula_to_the_bit(arm: Objective) -> None:
    """Wrong: that a model may have several tasks changes what a model of one learns."""
    logits, labels, teacher, target = some(500, 1, seed=9)
    (z_s, z_d, z_a), (y, p, t) = (
        (x[:, 0] for x in logits),
        (x[:, 0] for x in (labels, teacher, target)),
    )
    loss = F.binary_cross_entropy_with_logits(z_s, y, reduction="none")
    if arm is Objective.KD:
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(z_s, p, reduction="none")
    if arm in (Objective.AH, Objective.AH_SA):
        loss = loss + 0.25 * F.binary_cross_entropy_with_logits(
            z_d, (3 * p).clamp(max=1), reduction="none"
        )
    if arm is Objective.AH_SA:
        loss = loss + 2 * F.binary_cross_entropy_with_logits(z_a, t, reduction="none")
    assert torch.equal(objective_B(arm, WEIGHTS, logits, labels, teacher, target), loss)


@pytest.mark.parametrize("arm", list(Objective))
def test_without_supervision_every_arm_learns_the_labels(arm: Objective) -> None:
    """Wrong: an arm skips or invents something where there is no teacher, and the comparison of
    arms is not fair."""
    assert torch.equal(
        objective_B(arm, WEIGHTS, LOGITS, LABELS, None, None),
        bce_BT(LOGITS.serving_BT, LABELS)[:, 0],
    )


def test_extreme_logits_and_soft_targets() -> None:
    """Wrong: the loss overflows, or soft targets are rounded."""
    loss = bce_BT(torch.tensor([200.0, -200.0, 0.7]), torch.tensor([0.25, 1.0, 0.3]))
    torch.testing.assert_close(loss, torch.tensor([150.0, 200.0, h(0.7, 0.3)]))


def test_tasks_are_averaged() -> None:
    """Wrong: the scale of the foundation model's loss moves with its number of tasks."""
    logits = torch.tensor([[0.1, -1.0], [2.0, 0.5]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    expected = torch.tensor([(h(0.1, 1) + h(-1, 0)) / 2, (h(2, 0) + h(0.5, 0)) / 2])
    torch.testing.assert_close(labels_objective_B(logits, labels), expected)


def test_the_adapter_arm_needs_its_target() -> None:
    """Wrong: a forgotten target silently makes ah_sa the same as ah."""
    with pytest.raises(AssertionError, match="adapter's target"):
        objective_B(Objective.AH_SA, WEIGHTS, LOGITS, LABELS, TEACHER, None)


@pytest.mark.parametrize("objective", list(Objective))
def test_a_missing_label_teaches_nothing(objective: Objective) -> None:
    """Wrong: a correction, which tells one task's label, moves the others, or makes the loss or its
    gradient NaN."""
    logits, labels, teacher, target = some(40, 2, seed=3)
    partial = labels.clone()
    partial[::2, 1] = float("nan")
    serving = logits.serving_BT.clone().requires_grad_()
    loss_B = objective_B(
        objective, WEIGHTS, logits._replace(serving_BT=serving), partial, teacher, target
    )
    hidden_B = (
        F.binary_cross_entropy_with_logits(logits.serving_BT[:, 1], labels[:, 1], reduction="none")
        / 2
    )
    hidden_B[1::2] = 0
    torch.testing.assert_close(
        loss_B, objective_B(objective, WEIGHTS, logits, labels, teacher, target) - hidden_B
    )
    loss_B.sum().backward()
    assert serving.grad is not None and torch.isfinite(serving.grad).all()
    if objective is not Objective.KD:  # whose teacher's term is on the same head
        assert (serving.grad[::2, 1] == 0).all() and (serving.grad[1::2] != 0).all()
