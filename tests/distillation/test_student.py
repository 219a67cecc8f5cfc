"""The heads of the arms, and what their gradients reach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exfm_ray.config.arms import Objective
from exfm_ray.config.distillation import AHConfig, DistillationConfig, SAConfig
from exfm_ray.config.models import MLPConfig
from exfm_ray.distillation.objective import Weights, objective_B
from exfm_ray.distillation.student import Student, scale_gradient
from exfm_ray.models.network import build_network
from exfm_ray.schema import Schema, SparseFeature

SCHEMA = Schema(
    features=(SparseFeature(name="u", rows=9), SparseFeature(name="i", rows=9)),
    tasks=("click", "like"),
)
DENSE = torch.empty(6, 0)
WEIGHTS = Weights.from_config(DistillationConfig())


def make(
    arm: Objective,
    beta: float = 4.0,
    separate_head: bool = True,
    seed: int = 0,
    tasks: int = 2,
) -> Student:
    config = DistillationConfig(
        ah=AHConfig(beta=beta, mlp=(5,)), sa=SAConfig(separate_head=separate_head)
    )
    return Student(
        build_network(MLPConfig(dim=4, mlp=(8,)), SCHEMA, tasks, seed=0), arm, config, seed
    )


def embedded() -> Tensor:
    return torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize(
    ("arm", "separate_head", "heads"),
    [
        (Objective.LABELS, True, 0),
        (Objective.KD, True, 0),
        (Objective.AH, True, 1),
        (Objective.AH_SA, True, 2),
        (Objective.AH_SA, False, 1),
    ],
)
def test_heads_of_each_arm(
    arm: Objective,
    separate_head: bool,
    heads: int,
) -> None:
    """Wrong: an arm carries a head that nothing trains, or misses one."""
    student = make(arm, separate_head=separate_head)
    logits = student(embedded(), DENSE)
    names = {name.split(".")[0] for name, _ in student.named_parameters()} - {"network"}
    assert len(names) == heads
    assert (logits.auxiliary_BT is not None) == (arm in (Objective.AH, Objective.AH_SA))
    assert (logits.adapter_BT is not None) == (arm is Objective.AH_SA)
    if arm is Objective.AH_SA:
        assert (logits.adapter_BT is logits.auxiliary_BT) == (not separate_head)
        assert separate_head != torch.equal(logits.adapter_BT, logits.auxiliary_BT)
    assert all(z is None or (z.dtype, z.shape) == (torch.float32, (6, 2)) for z in logits)


def test_all_arms_start_with_the_same_serving_network() -> None:
    """Wrong: arms differ by their random start, and the gain of an arm is luck."""
    x = embedded()
    reference = make(Objective.LABELS)
    for arm in Objective:
        student = make(arm)
        assert torch.equal(student(x, DENSE).serving_BT, reference(x, DENSE).serving_BT)
        for name, weight in reference.network.state_dict().items():
            assert torch.equal(weight, student.network.state_dict()[name]), (arm, name)


def test_extra_heads_depend_on_their_seed_only() -> None:
    """Wrong: the auxiliary head of ah and of ah_sa, or of a run and its repetition, start
    differently."""
    ah = make(Objective.AH)
    torch_state = torch.get_rng_state()
    both = make(Objective.AH_SA)
    other = make(Objective.AH, seed=1)
    assert torch.equal(torch_state, torch.get_rng_state())
    first = [h.auxiliary_head.mlp[-1].weight for h in (ah, both, other)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_scaling_is_exact() -> None:
    """Wrong: the forward pass changes by a rounding, or the gradient is not beta times the plain
    one."""
    x = torch.randn(1000).mul(1e3).requires_grad_()
    y = scale_gradient(x, torch.tensor(0.1))
    assert torch.equal(x, y)
    y.backward(torch.arange(1000.0))
    assert torch.equal(x.grad, torch.arange(1000.0) * 0.1)


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("separate_head", [True, False])
def test_beta_scales_what_reaches_backbone_and_tables_and_nothing_else(
    separate_head: bool, tasks: int
) -> None:
    """Wrong: beta changes the forward pass, the heads' own gradients, or misses the backbone or the
    tables."""
    gradients = {}
    forwards = {}
    for beta in (0.0, 1.0, 4.0):
        student = make(Objective.AH_SA, beta, separate_head, tasks=tasks)
        x = embedded()
        logits = student(x, DENSE)
        forwards[beta] = logits
        (logits.auxiliary_BT.sum() + logits.adapter_BT.sum()).backward()
        gradients[beta] = {n: p.grad for n, p in student.named_parameters()} | {"tables": x.grad}
    for beta in (0.0, 4.0):
        assert all(torch.equal(a, b) for a, b in zip(forwards[beta], forwards[1.0], strict=True))
        for name, plain in gradients[1.0].items():
            if plain is None:
                assert name.startswith("network.head.") and gradients[beta][name] is None
            else:
                torch.testing.assert_close(
                    gradients[beta][name],
                    plain * (1.0 if "_head." in name else beta),
                    rtol=1e-6,
                    atol=1e-9,
                )
    assert gradients[1.0]["tables"].abs().sum() > 0 and not gradients[0.0]["tables"].any()


@pytest.mark.parametrize("arm", [Objective.AH, Objective.AH_SA])
def test_the_teacher_does_not_reach_the_serving_head(arm: Objective) -> None:
    """Wrong: the serving head's gradient depends on the teacher: its bias leaks into what is
    served."""
    label = torch.tensor([[0.0, 1], [0, 0], [1, 0]]).repeat(2, 1)
    serving = []
    for teacher in (torch.full((6, 2), 0.01), torch.full((6, 2), 0.99)):
        student = make(arm)
        objective_B(
            arm, WEIGHTS, student(embedded(), DENSE), label, teacher, 1 - teacher
        ).sum().backward()
        serving.append([p.grad for p in student.network.head.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*serving, strict=True))


def test_the_label_does_not_reach_the_auxiliary_head() -> None:
    """Wrong: the auxiliary head learns the label, which blunts its use as a channel for the
    teacher."""
    heads = []
    for label in (torch.zeros(6, 2), torch.ones(6, 2)):
        student = make(Objective.AH)
        objective_B(
            Objective.AH, WEIGHTS, student(embedded(), DENSE), label, torch.full((6, 2), 0.3), None
        ).sum().backward()
        heads.append([p.grad for p in student.auxiliary_head.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*heads, strict=True))


@pytest.mark.parametrize("arm", list(Objective))
def test_each_task_teaches_its_own_outputs(arm: Objective) -> None:
    """Wrong: an output of one task, served or not, gets a gradient from labels, teacher or
    adapter's target of another task."""
    generator = torch.Generator().manual_seed(1)
    first = [torch.rand(6, 2, generator=generator) for _ in range(3)]
    found = []
    for changed in (False, True):
        label, teacher, target = (
            torch.stack([x[:, 0], 1 - x[:, 1]], dim=1) if changed else x for x in first
        )
        student = make(arm)
        objective_B(
            arm, WEIGHTS, student(embedded(), DENSE), label.round(), teacher, target
        ).sum().backward()
        heads = [
            head
            for head in (student.network.head, student.auxiliary_head, student.adapter_head)
            if head is not None
        ]
        found.append([parameter.grad for head in heads for parameter in head.mlp[-1].parameters()])
    for before, after in zip(*found, strict=True):
        assert before[0].any() and torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])
