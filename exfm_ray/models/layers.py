"""Building blocks that the models share, initialised by true fan-in.

`nn.Linear` keeps its weight as (out, in): the fan-in is the last axis. Every weight of this package
that is no `nn.Linear` is stored the same way round, for taking the wrong axis is the known fault of
public Wukong versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RELU_GAIN = (
    2.0**0.5
)  # He et al. (arXiv 1502.01852): a ReLU halves the second moment, the weights double it


def fan_in_normal_(weight: Tensor, gain: float = 1.0) -> Tensor:
    """Fill `weight` (out, in) from a normal of standard deviation gain / sqrt(in); returns it."""
    with torch.no_grad():
        return weight.normal_(0.0, gain / weight.shape[-1] ** 0.5)


def linear(
    inputs: int,
    outputs: int,
    gain: float = 1.0,
) -> nn.Linear:
    """A linear map with bias zero; gain 1 keeps the second moment of its input."""
    layer = nn.Linear(inputs, outputs)
    fan_in_normal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def relu_mlp(
    inputs: int,
    widths: Sequence[int],
    dropout: float = 0.0,
) -> nn.Sequential:
    """Linear, ReLU and dropout for every width; the identity where there is none. Output:
    `width_out(inputs, widths)`."""
    layers: list[nn.Module] = []
    for before, width in zip((inputs, *widths), widths, strict=False):
        layers += [
            linear(before, width, RELU_GAIN),
            nn.ReLU(),
            *([nn.Dropout(dropout)] if dropout else []),
        ]
    return nn.Sequential(*layers)


def mlp_to(
    inputs: int,
    widths: Sequence[int],
    outputs: int,
    gain: float = 1.0,
    dropout: float = 0.0,
) -> nn.Sequential:
    """ReLU layers of `widths`, then a linear layer to `outputs`."""
    return nn.Sequential(
        *relu_mlp(inputs, widths, dropout), linear(width_out(inputs, widths), outputs, gain)
    )


def width_out(inputs: int, widths: Sequence[int]) -> int:
    """Width that leaves `relu_mlp(inputs, widths)`."""
    return (inputs, *widths)[-1]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, CPU tensors are drawn from `seed`; afterwards torch's own generator goes on as if
    nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
