"""Wukong against its equations (arXiv 2403.02545)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from exfm_ray.config.models import MLPConfig, ModelConfig, WukongConfig
from exfm_ray.models.layers import linear, seeded
from exfm_ray.models.layout import Inputs
from exfm_ray.models.registry import build_backbone
from exfm_ray.models.wukong import (
    AttentiveProjection,
    FactorizationMachineBlock,
    RowMix,
    Wukong,
    WukongLayer,
)

NO_DENSE = torch.empty(0, 0)
each_projection = pytest.mark.parametrize("projection", ["learnable", "attentive", "plain"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make hundreds of tiny steps slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(
    config: WukongConfig,
    features: int,
    dense: int = 0,
    seed: int = 0,
) -> Wukong:
    with seeded(seed):
        model = Wukong(config, Inputs(features, dense)).double()
        for (
            parameter
        ) in model.parameters():  # biases and norms too: a term that is left out must show
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def layer_norm(x: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps) * array(
        norm.weight
    ) + array(norm.bias)


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


def direct_fm(x: np.ndarray, project: nn.Module) -> np.ndarray:
    """X X^T Y of one example with the n x n matrix written out, which the model never makes but for
    the plain FM."""
    pairs = np.array([[a @ b for b in x] for a in x])
    if isinstance(project, RowMix):
        return pairs @ array(project.weight).T
    if isinstance(project, AttentiveProjection):
        compressed = array(project.compress.weight) @ x
        return pairs @ mlp(layer_norm(compressed.reshape(-1), project.norm), project.mlp).reshape(
            len(x), -1
        )
    return pairs


def direct_layer(x: np.ndarray, layer: WukongLayer) -> np.ndarray:
    """One example (n, E), written as in the paper: one matrix at a time."""
    rows = []
    if layer.fmb is not None:
        fm = direct_fm(x, layer.fmb.project)
        rows.append(
            mlp(layer_norm(fm.reshape(-1), layer.fmb.norm), layer.fmb.mlp).reshape(layer.fmb.shape)
        )
    if layer.lcb is not None:
        rows.append(array(layer.lcb.weight) @ x)
    residual = array(layer.residual.weight) @ x if isinstance(layer.residual, RowMix) else x
    return layer_norm(np.concatenate(rows) + residual, layer.norm)


@pytest.mark.parametrize(
    ("n_F", "n_L", "k", "features", "dense"),
    [
        (3, 2, 2, 7, 0),
        (3, 2, 2, 5, 0),
        (3, 2, 2, 4, 3),
        (0, 3, 2, 5, 0),
        (4, 0, 2, 5, 2),
        (1, 2, 6, 7, 0),
    ],
    ids=[
        "projected residual",
        "identity residual",
        "dense rows",
        "without FMB",
        "without LCB",
        "k above the rows of layer 2",
    ],
)
@each_projection
def test_equals_the_equations(
    projection: str,
    n_F: int,
    n_L: int,
    k: int,
    features: int,
    dense: int,
) -> None:
    """Wrong: a term, an axis or the order of the rows differs from the paper's equations."""
    config = WukongConfig(
        dim=4,
        l=3,
        n_F=n_F,
        n_L=n_L,
        k=k,
        projection=projection,
        attentive_mlp=(7,),
        fmb_mlp=(6, 5),
        mlp=(8, 3),
        dense_rows=2,
    )
    model = make(config, features, dense)
    x_BFE = torch.randn(9, features, 4).double()
    dense_BD = torch.randn(9, dense).double()
    expected = []
    for x, d in zip(array(x_BFE), array(dense_BD), strict=True):
        if model.dense is not None:
            x = np.concatenate([x, mlp(d, model.dense).reshape(2, 4)])
        for layer in model.layers:
            x = direct_layer(x, layer)
        expected.append(mlp(x.reshape(-1), model.mlp))
    assert model.out_features == 3
    np.testing.assert_allclose(
        array(model(x_BFE, dense_BD)), np.stack(expected), rtol=1e-9, atol=1e-12
    )


def test_two_features_by_hand() -> None:
    """Wrong: FM is not X X^T Y, e.g. the projection sits on the other side, or pairs are
    missing."""
    layer = WukongLayer(WukongConfig(dim=2, n_F=1, n_L=1, k=1, fmb_mlp=()), rows=2).double()
    assert layer.fmb is not None and layer.lcb is not None
    layer.fmb.norm, layer.norm = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        layer.fmb.project.weight.copy_(torch.tensor([[1.0, 10.0]]))
        layer.fmb.mlp[-1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.lcb.weight.copy_(torch.tensor([[2.0, -1.0]]))
    x = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]]).double()
    # <x1,x1> = 5, <x1,x2> = 13, <x2,x2> = 34: FM = (5 + 130, 13 + 340); LCB = 2 x1 - x2 = (-1, -1);
    # residual = X
    torch.testing.assert_close(
        layer(x), torch.tensor([[[135.0 + 1, 353.0 + 2], [-1.0 + 3, -1.0 + 5]]]).double()
    )


def test_two_features_by_hand_without_a_projection() -> None:
    """Wrong: the plain FM is not X X^T: <x1,x1>, <x1,x2>, <x2,x1>, <x2,x2>."""
    layer = WukongLayer(
        WukongConfig(dim=2, n_F=2, n_L=0, projection="plain", fmb_mlp=()), rows=2
    ).double()
    assert layer.fmb is not None
    layer.fmb.norm, layer.norm = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        layer.fmb.mlp[-1].weight.copy_(torch.eye(4))
    x = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]]).double()
    torch.testing.assert_close(
        layer(x), torch.tensor([[[5.0 + 1, 13.0 + 2], [13.0 + 3, 34.0 + 5]]]).double()
    )


@pytest.mark.parametrize("rows_in", [4, 256])
def test_row_mix_is_initialised_by_true_fan_in(rows_in: int) -> None:
    """Wrong: the wrong axis of the weight sets the scale (the known fault of public versions): the
    output's scale moves with n."""
    with seeded(0):
        mixed = RowMix(rows_in, 64)(torch.randn(512, rows_in, 16))
    assert 0.8 < mixed.square().mean() < 1.25


@pytest.mark.parametrize("scale", [0.001, 0.05, 20.0])
@pytest.mark.parametrize("rows", [4, 64])
def test_attentive_projection_starts_at_the_scale_of_the_learnable_one(
    rows: int, scale: float
) -> None:
    """Wrong: Y follows the scale of the embeddings or the wrong fan-in, is the same for all
    examples, or has nothing in common between them."""
    with seeded(0):
        project = AttentiveProjection(WukongConfig(dim=2 * rows), rows, columns=16).double()
        x = torch.randn(64, rows, 2 * rows).double() * scale
    y_BKN = project(x) @ torch.linalg.pinv(x)  # X has full row rank
    assert 0.8 < y_BKN.square().mean() * rows < 1.25
    assert 0.2 < y_BKN.var(dim=0).mean() * rows < 0.5


@each_projection
def test_interactions_start_at_the_same_size_whatever_the_scale_of_the_embeddings(
    projection: str,
) -> None:
    """Wrong: the FM of small embeddings, quadratic in them, disappears below the epsilon of its
    layer norm."""
    with seeded(0):
        fmb = FactorizationMachineBlock(WukongConfig(projection=projection), rows=20)
        x = torch.randn(64, 20, 16)
    torch.testing.assert_close(fmb(x * 0.005), fmb(x), rtol=0.01, atol=0.01)


@each_projection
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_gradients_at_the_start_neither_vanish_nor_explode(projection: str, scale: float) -> None:
    """Wrong: depth changes the size of the gradients so much that deep models do not learn from the
    start."""
    norms = {}
    for depth in (2, 4, 8, 16):
        with seeded(0):
            model = Wukong(WukongConfig(l=depth, projection=projection), Inputs(20, 0))
            x = (torch.randn(256, 20, 16) * scale).requires_grad_()
        model(x, torch.empty(256, 0)).square().mean().backward()
        layers = [
            torch.stack([p.grad.norm() for p in layer.parameters()]).norm().item()
            for layer in model.layers
        ]
        assert max(layers) / min(layers) < 10, f"l={depth}"
        norms[depth] = x.grad.norm().item()
    assert max(norms.values()) / min(norms.values()) < 4, norms


@each_projection
def test_an_example_does_not_see_the_others(projection: str) -> None:
    """Wrong: the result of an example depends on its place in the batch or on its neighbours."""
    model = make(WukongConfig(dim=4, n_F=3, n_L=2, k=2, projection=projection), 6, 2)
    x = torch.randn(11, 6, 4).double()
    dense = torch.randn(11, 2).double()
    order = torch.randperm(11)
    torch.testing.assert_close(
        model(x[order], dense[order]), model(x, dense)[order], rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(model(x[:1], dense[:1]), model(x, dense)[:1], rtol=1e-12, atol=1e-12)


def test_dense_features_matter_and_their_rows_start_at_the_scale_of_embeddings() -> None:
    """Wrong: dense features are dropped, or their rows are so large that the norm in FMB hides the
    embeddings."""
    with seeded(0):
        model = Wukong(WukongConfig(), Inputs(20, 5))
        dense = torch.randn(512, 5)
    assert model.dense is not None
    assert 0.02 < model.dense(dense).std() < 0.1
    x = torch.randn(512, 20, 16) * 0.05
    assert not torch.allclose(model(x, dense), model(x, dense + 1))


def test_rank_above_the_rows_of_the_input_is_refused() -> None:
    """Wrong: a projection that expands instead of compressing is built without a word, or the
    paper's own l=2, n=8, k=24 is refused."""
    with pytest.raises(
        ValueError, match=r"model.k is 9, above the 8 rows of the input: .*set k to 8 or less"
    ):
        Wukong(WukongConfig(k=9), Inputs(8, 0))
    with pytest.raises(ValueError, match="above the 10 rows"):  # dense features add rows
        Wukong(WukongConfig(k=11, dense_rows=2), Inputs(8, 3))
    layers = Wukong(WukongConfig(l=2, n_F=8, n_L=8, k=24), Inputs(30, 0)).layers
    assert [layer.fmb.project.weight.shape for layer in layers] == [(24, 30), (16, 16)]
    Wukong(WukongConfig(k=9, n_F=0), Inputs(8, 0))  # without FMB there is no projection
    Wukong(WukongConfig(k=9, projection="plain"), Inputs(8, 0))


def test_attentive_rows_above_the_rows_are_cut() -> None:
    """Wrong: the input of the attentive projection is expanded instead of compressed."""
    project = AttentiveProjection(WukongConfig(attentive_rows=4), rows=3, columns=2)
    assert project.compress.weight.shape == (3, 3)


@each_projection
def test_dropout(projection: str) -> None:
    """Wrong: a ReLU without dropout, dropout outside training, or other weights with it than
    without."""
    models = []
    for dropout in (0.0, 0.5):
        with seeded(0):
            models.append(
                Wukong(WukongConfig(projection=projection, dropout=dropout), Inputs(20, 3))
            )
    plain, dropping = models
    x = torch.randn(8, 20, 16)
    dense = torch.randn(8, 3)
    assert not torch.equal(dropping(x, dense), dropping(x, dense))
    torch.testing.assert_close(dropping.eval()(x, dense), plain(x, dense))
    modules = list(dropping.modules())
    after_relu = [
        type(modules[i + 1]) for i, module in enumerate(modules) if isinstance(module, nn.ReLU)
    ]
    assert after_relu == [nn.Dropout] * (
        6 if projection == "attentive" else 4
    )  # dense rows, FMB of two layers (and their projections), final


def error_on_products(config: ModelConfig) -> float:
    """Mean squared error, after 150 small batches, on a sum of weighted dot products of rows; 1 is
    the error of the mean."""
    with seeded(0):
        model = build_backbone(config, Inputs(8, 0))
        weight = torch.randn(8, 8).triu(1)
        head = linear(model.out_features, 1, 0.1)
        optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=3e-3)
        errors = []
        for _ in range(150):
            x = torch.randn(64, 8, config.dim)
            target = ((weight @ x) * x).sum((1, 2)) / (weight.norm() * config.dim**0.5)
            error = (head(model(x * 0.05, torch.empty(64, 0)))[:, 0] - target).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            errors.append(error.item())
    return float(np.mean(errors[-20:]))


@pytest.mark.parametrize(
    ("config", "low", "high"),
    [
        *(
            (WukongConfig(dim=8, k=6, fmb_mlp=(64,), mlp=(32,), projection=p), 0.0, 0.2)
            for p in ("learnable", "attentive", "plain")
        ),
        (MLPConfig(dim=8, mlp=(256, 128)), 0.8, 1.3),
    ],
    ids=["learnable", "attentive", "plain", "mlp"],
)
def test_learns_products_of_rows_where_an_mlp_does_not(
    config: ModelConfig,
    low: float,
    high: float,
) -> None:
    """Wrong: scales at the start hide the interactions, so that Wukong does not beat an MLP (users
    of public versions report it)."""
    assert low < error_on_products(config) < high


@each_projection
def test_bf16(projection: str) -> None:
    """Wrong: a float32 tensor inside the model breaks bf16, or bf16 gives another function."""
    with seeded(0):
        model = Wukong(WukongConfig(projection=projection), Inputs(20, 3))
        x = torch.randn(64, 20, 16) * 0.05
        dense = torch.randn(64, 3)
    full = model(x, dense)
    half = model.bfloat16()(x.bfloat16(), dense.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() / full.norm() < 0.05


@each_projection
def test_empty_batch(projection: str) -> None:
    """Wrong: a worker whose share of the last batch is empty fails."""
    assert Wukong(WukongConfig(projection=projection), Inputs(20, 0))(
        torch.empty(0, 20, 16), NO_DENSE
    ).shape == (0, 128)
