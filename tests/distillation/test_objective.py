"""Each arm's loss against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from exfm_ray.config import AHConfig, Arm, DistillationConfig, KDConfig, SAConfig
from exfm_ray.distillation.objective import bce_B, labels_objective_B, objective_B
from exfm_ray.distillation.student import Logits

CONFIG = DistillationConfig(kd=KDConfig(w=0.5), ah=AHConfig(w=0.25, alpha=3.0, beta=7.0), sa=SAConfig(w=2.0))
LOGITS = Logits(torch.tensor([[0.3], [-2.0]]), torch.tensor([1.1, -0.4]), torch.tensor([-1.7, 0.6]))
LABEL, TEACHER, TARGET = torch.tensor([1.0, 0.0]), torch.tensor([0.2, 0.8]), torch.tensor([0.35, 0.05])


def h(z: float, y: float) -> float:
    p = 1 / (1 + math.exp(-z))
    return -y * math.log(p) - (1 - y) * math.log(1 - p)


# alpha = 3: the teacher's 0.2 becomes 0.6 and its 0.8 is clipped at 1. beta is no part of the objective.
EXPECTED = {
    Arm.LABELS: [h(0.3, 1), h(-2, 0)],
    Arm.KD: [h(0.3, 1) + 0.5 * h(0.3, 0.2), h(-2, 0) + 0.5 * h(-2, 0.8)],
    Arm.AH: [h(0.3, 1) + 0.25 * h(1.1, 0.6), h(-2, 0) + 0.25 * h(-0.4, 1.0)],
    Arm.AH_SA: [h(0.3, 1) + 0.25 * h(1.1, 0.6) + 2 * h(-1.7, 0.35), h(-2, 0) + 0.25 * h(-0.4, 1.0) + 2 * h(0.6, 0.05)],
}


@pytest.mark.parametrize("arm", list(Arm))
def test_formula_of_each_arm(arm: Arm) -> None:
    """Wrong: a weight multiplies another term than its name says, alpha is not clipped, or heads are confused."""
    torch.testing.assert_close(objective_B(arm, CONFIG, LOGITS, LABEL, TEACHER, TARGET), torch.tensor(EXPECTED[arm]))


@pytest.mark.parametrize("arm", list(Arm))
def test_without_supervision_every_arm_learns_the_labels(arm: Arm) -> None:
    """Wrong: an arm skips or invents something where there is no teacher, and the comparison of arms is not fair."""
    assert torch.equal(objective_B(arm, CONFIG, LOGITS, LABEL, None, None), bce_B(LOGITS.serving_BT[:, 0], LABEL))


def test_extreme_logits_and_soft_targets() -> None:
    """Wrong: the loss overflows, or soft targets are rounded."""
    loss = bce_B(torch.tensor([200.0, -200.0, 0.7]), torch.tensor([0.25, 1.0, 0.3]))
    torch.testing.assert_close(loss, torch.tensor([150.0, 200.0, h(0.7, 0.3)]))


def test_tasks_are_averaged() -> None:
    """Wrong: the scale of the foundation model's loss moves with its number of tasks."""
    logits, labels = torch.tensor([[0.1, -1.0], [2.0, 0.5]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    expected = torch.tensor([(h(0.1, 1) + h(-1, 0)) / 2, (h(2, 0) + h(0.5, 0)) / 2])
    torch.testing.assert_close(labels_objective_B(logits, labels), expected)


def test_the_adapter_arm_needs_its_target() -> None:
    """Wrong: a forgotten target silently makes ah_sa the same as ah."""
    with pytest.raises(AssertionError, match="adapter's target"):
        objective_B(Arm.AH_SA, CONFIG, LOGITS, LABEL, TEACHER, None)
