"""MLP, DLRM and DCN-V2 against direct computation, and what all backbones promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from exfm_ray.model_config import DCNv2Config, DLRMConfig, MLPConfig, ModelConfig, WukongConfig
from exfm_ray.models.dcnv2 import DCNv2
from exfm_ray.models.dlrm import DLRM
from exfm_ray.models.layers import mlp_to, relu_mlp, seeded
from exfm_ray.models.layout import Inputs
from exfm_ray.models.mlp import MLP
from exfm_ray.models.registry import BACKBONES, build_backbone

CONFIGS: tuple[ModelConfig, ...] = (WukongConfig(k=4), MLPConfig(), DLRMConfig(), DCNv2Config())


def inputs(features: int, dim: int, dense: int) -> tuple[torch.Tensor, torch.Tensor]:
    with seeded(1):
        return torch.randn(13, features, dim).double(), torch.randn(13, dense).double()


def run(layers: nn.Sequential, x: np.ndarray) -> np.ndarray:
    for layer in layers:
        x = np.maximum(x, 0) if isinstance(layer, nn.ReLU) else x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    return x


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
        cross = start * (cross @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()) + cross
    expected = np.concatenate([cross, run(model.deep, start)], axis=1)
    np.testing.assert_allclose(model(x, d).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.type)
@pytest.mark.parametrize("dense", [0, 2])
def test_every_backbone_keeps_its_promises(config: ModelConfig, dense: int) -> None:
    """Wrong: a model has another width than it says, leaves a parameter without gradient, fails in bf16 or on no examples."""
    model = build_backbone(config, Inputs(6, dense))
    x, d = inputs(6, config.dim, dense)
    y = model(x.float(), d.float())
    assert y.shape == (13, model.out_features)
    y.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    assert model(x[:0].float(), d[:0].float()).shape == (0, model.out_features)
    assert model.bfloat16()(x.bfloat16(), d.bfloat16()).dtype == torch.bfloat16


def test_every_config_has_a_model() -> None:
    """Wrong: a config type is accepted that no model is registered for."""
    assert {type(c) for c in CONFIGS} == set(BACKBONES)


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
