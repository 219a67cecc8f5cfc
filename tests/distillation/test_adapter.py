"""The student adapter."""

from __future__ import annotations

import pytest
import torch

from exfm_ray.config import SAConfig
from exfm_ray.distillation.adapter import Adapter, target_B
from exfm_ray.distillation.objective import bce_B

CONFIGS = [SAConfig(), SAConfig(input="probability"), SAConfig(mlp=())]


def step(adapter: Adapter, optimizer: torch.optim.Optimizer, teacher: torch.Tensor, label: torch.Tensor) -> None:
    optimizer.zero_grad()
    bce_B(adapter(teacher), label).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("config", CONFIGS, ids=["logit", "probability", "platt"])
def test_starts_as_the_teacher(config: SAConfig) -> None:
    """Wrong: the first targets are noise instead of the teacher's own predictions."""
    teacher = torch.tensor([1e-4, 0.02, 0.5, 0.97])
    torch.testing.assert_close(target_B(Adapter(config)(teacher)), teacher, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("config", CONFIGS, ids=["logit", "probability", "platt"])
def test_corrects_a_biased_teacher(config: SAConfig) -> None:
    """Wrong: the adapter does not learn from the labels, so drift of the teacher goes on into the student."""
    generator = torch.Generator().manual_seed(0)
    adapter = Adapter(config)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)
    truth = torch.rand(40_000, generator=generator) * 0.4
    teacher, label = truth * 2, torch.bernoulli(truth, generator=generator)  # the teacher says twice the rate
    for rows in torch.arange(40_000).split(200):
        step(adapter, optimizer, teacher[rows], label[rows])
    error = (target_B(adapter(teacher)) - truth).abs().mean()
    assert error < 0.04 < (teacher - truth).abs().mean()


def test_target_is_taken_before_the_update_and_carries_no_gradient() -> None:
    """Wrong: the target contains the label of its own batch (it becomes a copy of the labels), or the student trains the adapter."""
    teacher, label = torch.tensor([0.3, 0.3]), torch.tensor([1.0, 1.0])
    adapter = Adapter(SAConfig(lr=0.1))
    before = target_B(adapter(teacher))
    kept = before.clone()
    assert not before.requires_grad
    step(adapter, torch.optim.Adam(adapter.parameters(), lr=0.1), teacher, label)
    assert torch.equal(before, kept)
    assert (target_B(adapter(teacher)) > kept).all()


def test_certain_teachers_have_finite_targets() -> None:
    """Wrong: a prediction of exactly 0 or 1 (bf16 teachers make them) gives infinite logits and NaN gradients."""
    adapter = Adapter(SAConfig())
    logits = adapter(torch.tensor([0.0, 1.0]).bfloat16())
    assert logits.isfinite().all() and logits.dtype == torch.float32
    bce_B(logits, torch.tensor([1.0, 0.0])).sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


def test_seed() -> None:
    """Wrong: the adapter draws from the program's generator, so arms disturb one another."""
    state = torch.get_rng_state()
    first, again, other = Adapter(SAConfig(), 1), Adapter(SAConfig(), 1), Adapter(SAConfig(), 2)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.mlp[0].weight, again.mlp[0].weight) and not torch.equal(first.mlp[0].weight, other.mlp[0].weight)
