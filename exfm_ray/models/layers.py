"""Building blocks that the models share, initialized by true fan-in.

`nn.Linear` keeps its weight as (out, in): the fan-in is the last axis. Every weight of this package
that is not an `nn.Linear` has the same order of axes, because using the wrong axis is a known bug
of public Wukong implementations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RELU_GAIN = 2.0**0.5
"""Gain before a ReLU (He et al., arXiv 1502.01852): the ReLU halves the second moment, and the
weights double it."""


def fan_in_normal_(weight: Tensor, gain: float = 1.0) -> Tensor:
    """Fill `weight` (out, in) from a normal of standard deviation gain / sqrt(in) and return it."""
    fan_in = weight.shape[-1]
    std = gain / fan_in**0.5
    with torch.no_grad():
        return weight.normal_(0.0, std)


def linear(
    inputs: int,
    outputs: int,
    gain: float = 1.0,
) -> nn.Linear:
    """Build a linear map with bias zero; gain 1 keeps the second moment of its input."""
    layer = nn.Linear(inputs, outputs)
    fan_in_normal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def relu_mlp(
    inputs: int,
    widths: Sequence[int],
    dropout: float = 0.0,
) -> nn.Sequential:
    """Build linear, ReLU and dropout for every width; the identity if there are no widths.

    The output has `width_out(inputs, widths)` features.
    """
    layers: list[nn.Module] = []
    width_in = inputs
    for width in widths:
        layers.append(linear(width_in, width, RELU_GAIN))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        width_in = width
    return nn.Sequential(*layers)


def mlp_to(
    inputs: int,
    widths: Sequence[int],
    outputs: int,
    gain: float = 1.0,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Build ReLU layers of `widths`, then a linear layer to `outputs`."""
    hidden = relu_mlp(inputs, widths, dropout)
    last = linear(width_out(inputs, widths), outputs, gain)
    return nn.Sequential(*hidden, last)


def width_out(inputs: int, widths: Sequence[int]) -> int:
    """Number of features that leave `relu_mlp(inputs, widths)`."""
    return widths[-1] if widths else inputs


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw CPU tensors from `seed` inside the block and restore torch's generator afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
