"""The serving graph."""

from __future__ import annotations

import torch

from exfm_ray.config.models import MLPConfig
from exfm_ray.models.network import Head, build_network
from exfm_ray.schema import DenseFeature, Schema, SparseFeature

SCHEMA = Schema(
    features=(SparseFeature(name="u", rows=9),),
    dense=(DenseFeature(name="d"),),
    tasks=("click", "buy"),
)


def test_logits() -> None:
    """Wrong: the logits are not the head of the features, or tasks share one output."""
    network = build_network(MLPConfig(dim=4), SCHEMA, 2, seed=0)
    x = torch.randn(5, 2, 4)
    dense = torch.randn(5, 1)
    logits = network(x, dense)
    assert logits.shape == (5, 2) and not torch.allclose(logits[:, 0], logits[:, 1])
    assert torch.equal(logits, network.head(network.features(x, dense)))


def test_weights_depend_on_the_seed_only() -> None:
    """Wrong: two runs of one seed start differently because something was drawn before."""
    first = build_network(MLPConfig(), SCHEMA, 1, seed=4).state_dict()
    torch.randn(7)
    state = torch.get_rng_state()
    again = build_network(MLPConfig(), SCHEMA, 1, seed=4).state_dict()
    other = build_network(MLPConfig(), SCHEMA, 1, seed=5).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["head.mlp.0.weight"], other["head.mlp.0.weight"])


def test_fresh_logits_are_small_and_float32() -> None:
    """Wrong: a fresh head is sure of something, or the loss of a bf16 model is computed in bf16."""
    head = Head(64, (32,), 1)
    assert head(torch.randn(512, 64)).std() < 0.3
    assert head.bfloat16()(torch.randn(4, 64).bfloat16()).dtype == torch.float32
