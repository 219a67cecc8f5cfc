"""The student adapter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from exfm_ray.config.distillation import SAConfig
from exfm_ray.distillation.adapter import Adapter, target_BT
from exfm_ray.distillation.objective import bce_BT, labels_objective_B
from exfm_ray.models.layers import mlp_to, seeded

CONFIGS = [SAConfig(), SAConfig(input="probability"), SAConfig(mlp=())]


def step(
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    teacher: torch.Tensor,
    label: torch.Tensor,
) -> None:
    optimizer.zero_grad()
    labels_objective_B(adapter(teacher), label).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("config", CONFIGS, ids=["logit", "probability", "platt"])
def test_starts_as_the_teacher(config: SAConfig) -> None:
    """Wrong: the first targets are noise instead of the teacher's own predictions."""
    teacher = torch.tensor([[1e-4, 0.02], [0.5, 0.97]])
    torch.testing.assert_close(
        target_BT(Adapter(config, 2)(teacher)), teacher, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("config", CONFIGS, ids=["logit", "probability", "platt"])
def test_corrects_a_biased_teacher(config: SAConfig) -> None:
    """Wrong: the adapter does not learn from the labels, so drift of the teacher goes on into the
    student."""
    generator = torch.Generator().manual_seed(0)
    adapter = Adapter(config, 2)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)
    truth = 0.05 + torch.rand(40_000, 2, generator=generator) * 0.35
    teacher, label = (
        truth * torch.tensor([2.0, 0.5]),
        torch.bernoulli(truth, generator=generator),
    )  # twice the one rate, half the other
    for rows in torch.arange(40_000).split(200):
        step(adapter, optimizer, teacher[rows], label[rows])
    for task in range(2):
        error = (target_BT(adapter(teacher)) - truth)[:, task].abs().mean()
        assert error < 0.04 < 0.1 < (teacher - truth)[:, task].abs().mean()


def test_target_is_taken_before_the_update_and_carries_no_gradient() -> None:
    """Wrong: the target contains the label of its own batch (it becomes a copy of the labels), or
    the student trains the adapter."""
    teacher = torch.full((2, 2), 0.3)
    label = torch.ones(2, 2)
    adapter = Adapter(SAConfig(lr=0.1), 2)
    before = target_BT(adapter(teacher))
    kept = before.clone()
    assert not before.requires_grad
    step(adapter, torch.optim.Adam(adapter.parameters(), lr=0.1), teacher, label)
    assert torch.equal(before, kept)
    assert (target_BT(adapter(teacher)) > kept).all()


def test_certain_teachers_have_finite_targets() -> None:
    """Wrong: a prediction of exactly 0 or 1 (bf16 teachers make them) gives infinite logits and NaN
    gradients."""
    adapter = Adapter(SAConfig(), 1)
    logits = adapter(torch.tensor([[0.0], [1.0]]).bfloat16())
    assert logits.isfinite().all() and logits.dtype == torch.float32
    bce_BT(logits, torch.tensor([[1.0], [0.0]])).sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


def test_seed() -> None:
    """Wrong: the adapter draws from the program's generator, so arms disturb one another."""
    state = torch.get_rng_state()
    first, again, other = (Adapter(SAConfig(), 1, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    weights = [adapter.mlps[0][0].weight for adapter in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def gradients(adapter: Adapter) -> list[list[torch.Tensor]]:
    """Of each task's MLP."""
    return [[p.grad.clone() for p in mlp.parameters()] for mlp in adapter.mlps]


def test_each_task_has_an_adapter_of_its_own() -> None:
    """Wrong: an adapter learns labels, or sees predictions, of another task."""
    generator = torch.Generator().manual_seed(1)
    teacher, other = (torch.rand(64, 2, generator=generator) for _ in range(2))
    label = torch.bernoulli(teacher, generator=generator)
    found = []
    for changed in (False, True):
        adapter = Adapter(SAConfig(), 2)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)
        step(adapter, optimizer, teacher, label)  # now no layer is zero any more
        p = torch.stack([teacher[:, 0], other[:, 1]], dim=1) if changed else teacher
        y = torch.stack([label[:, 0], 1 - label[:, 1]], dim=1) if changed else label
        step(adapter, optimizer, p, y)
        found.append(gradients(adapter))
    for before, after in zip(found[0][0], found[1][0], strict=True):
        assert before.any() and torch.equal(before, after)
    assert not any(
        torch.equal(before, after) for before, after in zip(found[0][1], found[1][1], strict=True)
    )


@pytest.mark.parametrize("tasks", [1, 2])
def test_is_one_plain_mlp_for_each_task(tasks: int) -> None:
    """Wrong: that a model may have several tasks changes what the adapter of one learns (of one
    task: to the bit)."""
    generator = torch.Generator().manual_seed(2)
    teacher = torch.rand(50, tasks, generator=generator).clamp(0.01, 0.99)
    label = torch.bernoulli(teacher, generator=generator)
    adapter = Adapter(SAConfig(), tasks, seed=5)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)
    for rows in torch.arange(50).split(7):
        step(adapter, optimizer, teacher[rows], label[rows])
    for task in range(tasks):
        with seeded(5):
            mlp = mlp_to(1, (16,), 1, gain=0.0)
        adam = torch.optim.Adam(mlp.parameters(), lr=0.01)
        for rows in torch.arange(50).split(7):
            logit = torch.logit(teacher[rows, task])
            adam.zero_grad()
            adapted = logit + mlp(logit.unsqueeze(1)).squeeze(1)
            (
                F.binary_cross_entropy_with_logits(adapted, label[rows, task], reduction="none")
                / tasks
            ).mean().backward()
            adam.step()
        for found, expected in zip(adapter.mlps[task].parameters(), mlp.parameters(), strict=True):
            torch.testing.assert_close(
                found, expected, rtol=0 if tasks == 1 else 1e-5, atol=0 if tasks == 1 else 1e-7
            )
