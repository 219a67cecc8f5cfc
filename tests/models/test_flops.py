"""Floating-point operations against closed forms and real models; the ready Wukong sizes."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from exfm_ray.config.data import SyntheticConfig
from exfm_ray.config.load import load_config
from exfm_ray.config.models import DCNv2Config, DLRMConfig, MLPConfig, ModelConfig, WukongConfig
from exfm_ray.data.sources.synthetic import schema
from exfm_ray.models.flops import forward_flops, training_flops
from exfm_ray.models.layout import Inputs, Layout, SequenceRows
from exfm_ray.models.network import Head
from exfm_ray.models.registry import BACKBONES, build_backbone

pytestmark = pytest.mark.heavy

INPUTS = Inputs(20, 5, (SequenceRows(first=10, length=10, width=1, target=0),))
PRESET_FOLDER = Path(__file__).parents[2] / "configs" / "wukong"
PRESETS = {
    "0.5gf": 0.53,
    "2gf": 2.12,
    "22gf": 22.25,
}  # GFLOP per example in the figure of arXiv 2403.02545


def mlp(*widths: int) -> int:
    return sum(2 * a * b for a, b in pairwise(widths))


def wukong(
    config: WukongConfig,
    rows: int,
    dense: int,
) -> int:
    """2 for every multiplication of the equations, head included."""
    c = config
    e = config.dim
    out = config.n_F + config.n_L
    flops = 0
    n = rows
    if dense:
        n = rows + c.dense_rows
        flops = mlp(dense, c.dense_rows * e, c.dense_rows * e)
    for _ in range(c.l):
        k = n if c.projection == "plain" else min(c.k, n)
        if c.n_F:
            flops += 2 * n * k * e + mlp(n * k, *c.fmb_mlp, c.n_F * e)  # X (X^T Y), MLP
            flops += 0 if c.projection == "plain" else 2 * n * k * e  # X^T Y
            if c.projection == "attentive":
                few = min(c.attentive_rows, n)
                flops += 2 * few * n * e + mlp(few * e, *c.attentive_mlp, n * k)
        flops += 2 * c.n_L * n * e + (2 * out * n * e if n != out else 0)
        n = out
    return flops + mlp(out * e, *c.mlp, 1)


widths = st.lists(st.integers(1, 9), max_size=3).map(tuple)


@given(
    st.builds(
        WukongConfig,
        dim=st.integers(1, 6),
        l=st.integers(1, 4),
        n_F=st.integers(0, 5),
        n_L=st.integers(1, 5),
        k=st.integers(1, 7),
        projection=st.sampled_from(["learnable", "attentive", "plain"]),
        attentive_rows=st.integers(1, 9),
        attentive_mlp=widths,
        fmb_mlp=widths,
        mlp=widths,
    ),
    st.integers(7, 12),
    st.integers(0, 3),
)
@settings(max_examples=30)
def test_wukong_equals_the_closed_form(
    config: WukongConfig,
    rows: int,
    dense: int,
) -> None:
    """Wrong: a product of the equations is not made, made twice, or in the dear order: X X^T before
    Y."""
    assert forward_flops(config, Inputs(rows, dense)) == wukong(config, rows, dense)


@pytest.mark.parametrize("dense", [0, 5])
def test_other_models_equal_their_closed_forms(dense: int) -> None:
    """Wrong: a layer is left out, counted for another batch than one example, or without the
    head."""
    width = 20 * 16 + dense
    inputs = Inputs(20, dense)
    assert forward_flops(MLPConfig(mlp=(64, 32)), inputs) == mlp(width, 64, 32, 1)
    cross = 3 * mlp(width, width) + mlp(width, 64, 32) + 2 * (width + 32)
    assert forward_flops(DCNv2Config(cross_layers=3, mlp=(64, 32)), inputs) == cross
    rows = 20 + (dense > 0)
    bottom = mlp(dense, 32, 16) if dense else 0
    pairs = rows * (rows - 1) // 2 + (16 if dense else 0)
    assert forward_flops(DLRMConfig(), inputs) == bottom + 2 * rows * rows * 16 + mlp(
        pairs, 64, 32, 1
    )


@pytest.mark.parametrize("dense", [0, 5])
@pytest.mark.parametrize("config", [make() for make in BACKBONES], ids=lambda c: c.type)
def test_training_costs_three_times_the_forward_pass(config: ModelConfig, dense: int) -> None:
    """Wrong: a model that steps forward and back on real examples does other work than is said."""
    inputs = INPUTS._replace(dense=dense)
    backbone = build_backbone(config, inputs)
    head = Head(backbone.out_features, (), 1)
    with FlopCounterMode(display=False) as forward:
        logits = head(
            backbone(
                torch.randn(4, inputs.rows, config.dim, requires_grad=True), torch.randn(4, dense)
            )
        )
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert forward.get_total_flops() == 4 * forward_flops(config, inputs)
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total == pytest.approx(4 * training_flops(config, inputs), rel=0.02 if dense else 0)


def test_sizes_that_do_not_fit_are_reported() -> None:
    """Wrong: a model that cannot be built has a price."""
    with pytest.raises(ValueError, match="model.k is 21, above the 20 rows"):
        forward_flops(WukongConfig(k=21), Inputs(20, 0))


@pytest.mark.parametrize("preset", PRESETS)
def test_wukong_presets_cost_what_their_comments_say(preset: str) -> None:
    """Wrong: a ready size does not load, its comment names another cost, or it is far from the
    point of the paper's figure."""
    path = PRESET_FOLDER / f"{preset}.yaml"
    said = re.search(
        r"^# At (\d+) rows: ([\d.]+) GFLOP per example in training, (\d+) M parameters",
        path.read_text(),
        re.MULTILINE,
    )
    assert said
    model = load_config(path).fm.model
    inputs = Inputs(int(said[1]), 0)
    gflop = training_flops(model, inputs) / 1e9
    assert gflop == pytest.approx(float(said[2]), rel=0.005)
    assert gflop == pytest.approx(PRESETS[preset], rel=0.06)
    with torch.device("meta"):
        assert sum(
            p.numel() for p in build_backbone(model, inputs).parameters()
        ) / 1e6 == pytest.approx(int(said[3]), rel=0.01)


@pytest.mark.parametrize("preset", ["0.5gf", "2gf"])
def test_wukong_presets_fit_the_synthetic_stream_with_the_override_of_their_comments(
    preset: str,
) -> None:
    """Wrong: the comment's way out does not lead out, or there is no need for it."""
    path = PRESET_FOLDER / f"{preset}.yaml"
    stream = schema(SyntheticConfig())
    override = re.search(r"on the synthetic stream: --set (fm.model.k=\d+)\.", path.read_text())
    assert override
    inputs = Layout.from_config(load_config(path).fm.model, stream).inputs(len(stream.dense))
    with pytest.raises(
        ValueError,
        match=f"set {override[1].removeprefix('fm.model.').replace('=', ' to ')} or less",
    ):
        forward_flops(load_config(path).fm.model, inputs)
    assert forward_flops(load_config(path, [override[1]]).fm.model, inputs) > 0
