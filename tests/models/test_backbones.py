"""The students against direct computation (Wukong has a file of its own), and what all backbones
promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from example import SCHEMA, make_rows
from torch import nn

from exfm_ray.config.arms import Objective
from exfm_ray.config.distillation import DistillationConfig
from exfm_ray.config.models import (
    MODEL_TYPES,
    DCNv2Config,
    DeepFMConfig,
    DINConfig,
    DLRMConfig,
    FinalMLPConfig,
    MaskNetConfig,
    MLPConfig,
    ModelConfig,
    WukongConfig,
)
from exfm_ray.data.batch import to_batch
from exfm_ray.distillation.objective import Weights, objective_B
from exfm_ray.distillation.student import Student
from exfm_ray.models.dcnv2 import DCNv2
from exfm_ray.models.deepfm import DeepFM
from exfm_ray.models.din import DIN
from exfm_ray.models.dlrm import DLRM
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.finalmlp import FinalMLP
from exfm_ray.models.layers import mlp_to, relu_mlp, seeded
from exfm_ray.models.layout import Inputs, SequenceRows
from exfm_ray.models.masknet import MaskNet
from exfm_ray.models.mlp import MLP
from exfm_ray.models.network import build_network
from exfm_ray.models.registry import BACKBONES, build_backbone

CONFIGS: tuple[ModelConfig, ...] = (
    WukongConfig(k=4),
    MLPConfig(),
    DLRMConfig(),
    DCNv2Config(),
    DeepFMConfig(),
    MaskNetConfig(),
    FinalMLPConfig(gate_mlp=(8,), heads=2),
    DINConfig(),
)
# Rows 0 to 3 single values (2 and 3 of one id), 4 to 6 a sequence of row 1's table, 7 a mean, 8 to
# 11 a sequence of 2's, two rows a value.
SEQUENCES = (
    SequenceRows(first=4, length=3, width=1, target=1),
    SequenceRows(first=8, length=2, width=2, target=2),
)


def inputs(
    features: int,
    dim: int,
    dense: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    with seeded(1):
        return torch.randn(13, features, dim).double(), torch.randn(13, dense).double()


def run(layers: nn.Sequential, x: np.ndarray) -> np.ndarray:
    for layer in layers:
        x = (
            np.maximum(x, 0)
            if isinstance(layer, nn.ReLU)
            else x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        )
    return x


def norm(
    x: np.ndarray,
    gain: np.ndarray,
    bias: np.ndarray,
) -> np.ndarray:
    return gain * (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) + bias


def noisy(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("dense", [0, 3])
def test_mlp(dense: int) -> None:
    """Wrong: features are lost or the last activation is missing."""
    model = MLP(MLPConfig(dim=4, mlp=(8, 5)), Inputs(3, dense)).double()
    noisy(model)
    x, d = inputs(3, 4, dense)
    expected = run(model.hidden, np.concatenate([x.reshape(13, 12).numpy(), d.numpy()], axis=1))
    np.testing.assert_allclose(model(x, d).detach().numpy(), expected, rtol=1e-10)
    assert (expected >= 0).all() and model.out_features == 5


@pytest.mark.parametrize("dense", [0, 3])
def test_dlrm(dense: int) -> None:
    """Wrong: a pair is missing or counted twice, or the bottom row does not reach the top MLP."""
    model = DLRM(DLRMConfig(dim=4, bottom_mlp=(6,), top_mlp=(7, 5)), Inputs(3, dense)).double()
    noisy(model)
    x, d = inputs(3, 4, dense)
    expected = []
    for rows, numbers in zip(x.numpy(), d.numpy(), strict=True):
        top = []
        if model.bottom is not None:
            top = list(run(model.bottom, numbers))
            rows = np.concatenate([rows, [top]])
        top += [a @ b for a, b in itertools.combinations(rows, 2)]
        expected.append(run(model.top, np.array(top)))
    np.testing.assert_allclose(model(x, d).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dense", [0, 3])
def test_dcnv2(dense: int) -> None:
    """Wrong: the cross is not x0 * (W x + b) + x, or the two halves are not in parallel."""
    model = DCNv2(DCNv2Config(dim=4, cross_layers=3, mlp=(7, 5)), Inputs(3, dense)).double()
    noisy(model)
    x, d = inputs(3, 4, dense)
    start = np.concatenate([x.reshape(13, 12).numpy(), d.numpy()], axis=1)
    cross = start
    for layer in model.cross:
        cross = (
            start * (cross @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()) + cross
        )
    expected = np.concatenate([cross, run(model.deep, start)], axis=1)
    np.testing.assert_allclose(model(x, d).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dense", [0, 3])
def test_deepfm(dense: int) -> None:
    """Wrong: a pair of features is missing from the factorization machine, or a feature from the
    first order or the MLP."""
    model = DeepFM(DeepFMConfig(dim=4, mlp=(7, 5)), Inputs(3, dense)).double()
    noisy(model)
    x, d = inputs(3, 4, dense)
    weight = model.first_order.weight.detach().numpy()[0]
    bias = model.first_order.bias.item()
    expected = []
    for rows, numbers in zip(x.numpy(), d.numpy(), strict=True):
        first = (
            bias
            + sum(w @ row for w, row in zip(weight[:12].reshape(3, 4), rows, strict=True))
            + weight[12:] @ numbers
        )
        fields = list(rows)
        if model.dense_DE is not None:
            fields += [
                number * v
                for number, v in zip(numbers, model.dense_DE.detach().numpy(), strict=True)
            ]
        second = sum(a @ b for a, b in itertools.combinations(fields, 2))
        expected.append([first, second, *run(model.deep, np.concatenate([rows.ravel(), numbers]))])
    np.testing.assert_allclose(model(x, d).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dense", [0, 3])
def test_masknet(dense: int) -> None:
    """Wrong: a norm spans several rows, the mask sees normed rows, blocks share a mask, or the
    order of W, norm and ReLU differs."""
    model = MaskNet(
        MaskNetConfig(dim=4, blocks=3, block_width=6, mask_mlp=(9,), mlp=(7, 5)), Inputs(3, dense)
    ).double()
    noisy(model)
    x, d = inputs(3, 4, dense)
    gains = model.gain_RE.detach().numpy()
    biases = model.bias_RE.detach().numpy()
    expected = []
    for rows, numbers in zip(x.numpy(), d.numpy(), strict=True):
        flat = np.concatenate([rows.ravel(), numbers])
        normed = np.concatenate(
            [*(norm(row, g, b) for row, g, b in zip(rows, gains, biases, strict=True)), numbers]
        )
        merged = []
        for block in model.blocks:
            hidden = block.weight.detach().numpy() @ (run(block.mask, flat) * normed)
            merged.append(
                np.maximum(
                    norm(
                        hidden, block.norm.weight.detach().numpy(), block.norm.bias.detach().numpy()
                    ),
                    0,
                )
            )
        expected.append(run(model.mlp, np.concatenate(merged)))
    np.testing.assert_allclose(model(x, d).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gate_mlp", [(), (6,)])
@pytest.mark.parametrize("dense", [0, 3])
def test_finalmlp(dense: int, gate_mlp: tuple[int, ...]) -> None:
    """Wrong: heads mix, a product of the two streams is missing, or a gate is not 2 sigmoid(MLP(z))
    times z, one for each stream."""
    model = FinalMLP(
        FinalMLPConfig(dim=4, mlp_1=(7, 6), mlp_2=(4,), gate_mlp=gate_mlp, heads=2),
        Inputs(3, dense),
    ).double()
    noisy(model)
    assert model.stream_1[0] is not model.stream_2[0]
    x, d = inputs(3, 4, dense)
    expected = []
    for rows, numbers in zip(x.numpy(), d.numpy(), strict=True):
        flat = np.concatenate([rows.ravel(), numbers])
        outputs = []
        for gate, mlp in (model.stream_1, model.stream_2):
            outputs.append(
                run(mlp, flat * 2 / (1 + np.exp(-run(gate.mlp, flat))) if gate_mlp else flat)
            )
        first, second = outputs
        heads = []
        for k, w in enumerate(model.bilinear_KIJ.detach().numpy()):
            heads.append(
                sum(
                    first[3 * k + i] * w[i, j] * second[2 * k + j]
                    for i in range(3)
                    for j in range(2)
                )
            )
        expected.append([*first, *second, *heads])
    np.testing.assert_allclose(model(x, d).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dense", [0, 3])
def test_din(dense: int) -> None:
    """Wrong: absent positions count, a value is weighed against another target, weights are
    normalized, or a row is lost."""
    model = DIN(
        DINConfig(dim=4, attention_mlp=(6,), mlp=(7, 5)), Inputs(12, dense, SEQUENCES)
    ).double()
    noisy(model)
    x, d = inputs(12, 4, dense)
    expected = []
    for example, (rows, numbers) in enumerate(zip(x.numpy(), d.numpy(), strict=True)):
        flat = [*rows[:4], rows[7]]
        for attention, sequence in zip(model.attentions, SEQUENCES, strict=True):
            present = example % (sequence.length + 1)
            values = rows[
                sequence.first : sequence.first + sequence.length * sequence.width
            ].reshape(sequence.length, -1)
            values[present:] = 0  # a view: what the model is given, too
            target = rows[sequence.target : sequence.target + sequence.width].ravel()
            interest = np.zeros_like(target)
            for e in values[:present]:
                interest += (
                    run(attention.unit, np.concatenate([e, target, e - target, e * target])) * e
                )
            flat.append(interest)
        expected.append(run(model.mlp, np.concatenate([*flat, numbers])))
    np.testing.assert_allclose(model(x, d).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_din_without_a_sequence_is_refused() -> None:
    """Wrong: the user gets an MLP under the name of DIN, or an error that does not say what to
    do."""
    with pytest.raises(
        ValueError,
        match=r"model.type is din, but the stream has no sequence feature; declare one .* or use a "
        "model",
    ):
        DIN(DINConfig(), Inputs(4, 2))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.type)
@pytest.mark.parametrize("dense", [0, 2])
def test_every_backbone_keeps_its_promises(config: ModelConfig, dense: int) -> None:
    """Wrong: a model has another width than it says, leaves a parameter without gradient, fails in
    bf16 or on no examples."""
    model = build_backbone(config, Inputs(12, dense, SEQUENCES))
    x, d = inputs(12, config.dim, dense)
    y = model(x.float(), d.float())
    assert y.shape == (13, model.out_features)
    y.square().sum().backward()
    assert [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()
    ] == []
    assert model(x[:0].float(), d[:0].float()).shape == (0, model.out_features)
    assert model.bfloat16()(x.bfloat16(), d.bfloat16()).dtype == torch.bfloat16


def test_every_config_has_a_model() -> None:
    """Wrong: a config type is accepted that no model is registered for."""
    assert {type(c) for c in CONFIGS} == set(BACKBONES)
    assert {c.type for c in CONFIGS} == set(MODEL_TYPES)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.type)
def test_dropout(config: ModelConfig) -> None:
    """Wrong: the setting is accepted and ignored, or it is still at work when the model serves."""
    model = build_backbone(config.model_copy(update={"dropout": 0.5}), Inputs(12, 2, SEQUENCES))
    x, d = (tensor.float() for tensor in inputs(12, config.dim, 2))
    assert not torch.equal(model(x, d), model(x, d))
    model.eval()
    assert torch.equal(model(x, d), model(x, d))


@pytest.mark.parametrize("arm", [Objective.KD, Objective.AH, Objective.AH_SA])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.type)
def test_every_arm_trains_every_model(config: ModelConfig, arm: Objective) -> None:
    """Wrong: a model does not fit an arm's heads, or the arm's loss does not reach all of its
    weights and its tables."""
    batch = to_batch(make_rows(64, seed=1), SCHEMA)
    distillation = DistillationConfig()
    tables = LocalTables(SCHEMA, config, seed=0)
    student = Student(build_network(config, SCHEMA, 1, seed=0), arm, distillation)
    logits = student(tables(batch), batch.dense_BD)
    teacher_BT = torch.rand(64, 1, generator=torch.Generator().manual_seed(0))
    loss_B = objective_B(
        arm,
        Weights.from_config(distillation),
        logits,
        batch.labels_BT[:, :1],
        teacher_BT,
        1 - teacher_BT,
    )
    assert logits.serving_BT.shape == (64, 1) and loss_B.shape == (64,) and loss_B.isfinite().all()
    loss_B.mean().backward()
    parameters = [*tables.named_parameters(), *student.named_parameters()]
    assert [n for n, p in parameters if p.grad is None or not p.grad.abs().sum()] == []


@pytest.mark.parametrize("width", [32, 512])
def test_layers_keep_the_scale_whatever_their_width(width: int) -> None:
    """Wrong: the initial scale follows the wrong fan, so the signal dies or explodes with depth."""
    with seeded(0):
        x = torch.randn(4096, 64)
        deep = relu_mlp(64, (width, 512, width, 512))(x)
        out = mlp_to(64, (width, 512), 32)(x)
    assert 0.3 < deep.square().mean() < 3
    assert 0.3 < out.square().mean() < 3


def test_seeded_leaves_the_generator_alone() -> None:
    """Wrong: building a model changes what the program draws afterwards."""
    before = torch.get_rng_state()
    with seeded(5):
        first = torch.randn(3)
    assert torch.equal(before, torch.get_rng_state())
    with seeded(5):
        assert torch.equal(first, torch.randn(3))
