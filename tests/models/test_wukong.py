"""Wukong against its equations (arXiv 2403.02545)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from exfm_ray.model_config import WukongConfig
from exfm_ray.models.layers import seeded
from exfm_ray.models.layout import Inputs
from exfm_ray.models.wukong import RowMix, Wukong, WukongLayer

NO_DENSE = torch.empty(0, 0)


def make(config: WukongConfig, features: int, dense: int = 0, seed: int = 0) -> Wukong:
    with seeded(seed):
        model = Wukong(config, Inputs(features, dense)).double()
        for parameter in model.parameters():  # biases and norms too: a term that is left out must show
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def layer_norm(x: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps) * array(norm.weight) + array(norm.bias)


def mlp(x: np.ndarray, layers: nn.Sequential) -> np.ndarray:
    for layer in layers:
        x = (
            x @ array(layer.weight).T + array(layer.bias)
            if isinstance(layer, nn.Linear)
            else np.maximum(x, 0)
            if isinstance(layer, nn.ReLU)
            else mlp(x, layer)
        )
    return x


def direct_layer(x: np.ndarray, layer: WukongLayer) -> np.ndarray:
    """One example (n, E), written as in the paper: one matrix at a time."""
    rows = []
    if layer.fmb is not None:
        y_nk = array(layer.fmb.project.weight).T
        fm = x @ (x.T @ y_nk)
        rows.append(mlp(layer_norm(fm.reshape(-1), layer.fmb.norm), layer.fmb.mlp).reshape(layer.fmb.shape))
    if layer.lcb is not None:
        rows.append(array(layer.lcb.weight) @ x)
    residual = array(layer.residual.weight) @ x if isinstance(layer.residual, RowMix) else x
    return layer_norm(np.concatenate(rows) + residual, layer.norm)


@pytest.mark.parametrize(
    ("n_F", "n_L", "features", "dense"),
    [(3, 2, 7, 0), (3, 2, 5, 0), (3, 2, 4, 3), (0, 3, 5, 0), (4, 0, 5, 2)],
    ids=["projected residual", "identity residual", "dense rows", "without FMB", "without LCB"],
)
def test_equals_the_equations(n_F: int, n_L: int, features: int, dense: int) -> None:
    """Wrong: a term, an axis or the order of the rows differs from the paper's equations."""
    config = WukongConfig(dim=4, l=3, n_F=n_F, n_L=n_L, k=2, fmb_mlp=(6, 5), mlp=(8, 3), dense_rows=2)
    model = make(config, features, dense)
    x_BFE, dense_BD = torch.randn(9, features, 4).double(), torch.randn(9, dense).double()
    expected = []
    for x, d in zip(array(x_BFE), array(dense_BD), strict=True):
        if model.dense is not None:
            x = np.concatenate([x, mlp(d, model.dense).reshape(2, 4)])
        for layer in model.layers:
            x = direct_layer(x, layer)
        expected.append(mlp(x.reshape(-1), model.mlp))
    assert model.out_features == 3
    np.testing.assert_allclose(array(model(x_BFE, dense_BD)), np.stack(expected), rtol=1e-9, atol=1e-12)


def test_two_features_by_hand() -> None:
    """Wrong: FM is not X X^T Y, e.g. the projection sits on the other side, or pairs are missing."""
    layer = WukongLayer(WukongConfig(dim=2, n_F=1, n_L=1, k=1, fmb_mlp=()), rows=2).double()
    assert layer.fmb is not None and layer.lcb is not None
    layer.fmb.norm, layer.norm = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        layer.fmb.project.weight.copy_(torch.tensor([[1.0, 10.0]]))
        layer.fmb.mlp[-1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.lcb.weight.copy_(torch.tensor([[2.0, -1.0]]))
    x = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]]).double()
    # <x1,x1> = 5, <x1,x2> = 13, <x2,x2> = 34: FM = (5 + 130, 13 + 340); LCB = 2 x1 - x2 = (-1, -1); residual = X
    torch.testing.assert_close(layer(x), torch.tensor([[[135.0 + 1, 353.0 + 2], [-1.0 + 3, -1.0 + 5]]]).double())


@pytest.mark.parametrize("rows_in", [4, 256])
def test_row_mix_is_initialised_by_true_fan_in(rows_in: int) -> None:
    """Wrong: the wrong axis of the weight sets the scale (the known fault of public versions): the output's scale moves with n."""
    with seeded(0):
        mixed = RowMix(rows_in, 64)(torch.randn(512, rows_in, 16))
    assert 0.8 < mixed.square().mean() < 1.25


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_gradients_at_the_start_neither_vanish_nor_explode(scale: float) -> None:
    """Wrong: depth changes the size of the gradients so much that deep models do not learn from the start."""
    norms = {}
    for depth in (2, 4, 8, 16):
        with seeded(0):
            model = Wukong(WukongConfig(l=depth), Inputs(20, 0))
            x = (torch.randn(256, 20, 16) * scale).requires_grad_()
        model(x, torch.empty(256, 0)).square().mean().backward()
        layers = [torch.stack([p.grad.norm() for p in layer.parameters()]).norm().item() for layer in model.layers]
        assert max(layers) / min(layers) < 10, f"l={depth}"
        norms[depth] = x.grad.norm().item()
    assert max(norms.values()) / min(norms.values()) < 4, norms


def test_an_example_does_not_see_the_others() -> None:
    """Wrong: the result of an example depends on its place in the batch or on its neighbours."""
    model = make(WukongConfig(dim=4, n_F=3, n_L=2, k=2), 6, 2)
    x, dense, order = torch.randn(11, 6, 4).double(), torch.randn(11, 2).double(), torch.randperm(11)
    torch.testing.assert_close(model(x[order], dense[order]), model(x, dense)[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x[:1], dense[:1]), model(x, dense)[:1], rtol=1e-12, atol=1e-12)


def test_dense_features_matter_and_their_rows_start_at_the_scale_of_embeddings() -> None:
    """Wrong: dense features are dropped, or their rows are so large that the norm in FMB hides the embeddings."""
    with seeded(0):
        model = Wukong(WukongConfig(), Inputs(20, 5))
        dense = torch.randn(512, 5)
    assert model.dense is not None
    assert 0.02 < model.dense(dense).std() < 0.1
    x = torch.randn(512, 20, 16) * 0.05
    assert not torch.allclose(model(x, dense), model(x, dense + 1))


def test_rank_above_the_rows_is_refused() -> None:
    """Wrong: a projection that expands instead of compressing is built without a word."""
    with pytest.raises(ValueError, match=r"model.k is 9, above the 8 rows that enter layer 1.*set k to 8 or less"):
        Wukong(WukongConfig(k=9), Inputs(8, 0))
    with pytest.raises(ValueError, match="above the 4 rows that enter layer 2"):
        Wukong(WukongConfig(k=5, n_F=2, n_L=2), Inputs(8, 0))
    Wukong(WukongConfig(k=9, n_F=0), Inputs(8, 0))  # without FMB there is no projection


def test_bf16() -> None:
    """Wrong: a float32 tensor inside the model breaks bf16, or bf16 gives another function."""
    with seeded(0):
        model = Wukong(WukongConfig(), Inputs(20, 3))
        x, dense = torch.randn(64, 20, 16) * 0.05, torch.randn(64, 3)
    full = model(x, dense)
    half = model.bfloat16()(x.bfloat16(), dense.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() / full.norm() < 0.05


def test_empty_batch() -> None:
    """Wrong: a worker whose share of the last batch is empty fails."""
    assert Wukong(WukongConfig(), Inputs(20, 0))(torch.empty(0, 20, 16), NO_DENSE).shape == (0, 128)
