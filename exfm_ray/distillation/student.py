"""A network with the heads that its objective takes (ExFM, arXiv 2502.17494). Only the network is
served."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from exfm_ray.config.arms import Objective
from exfm_ray.config.distillation import DistillationConfig
from exfm_ray.config.models import Widths
from exfm_ray.models.layers import seeded
from exfm_ray.models.network import Head, Network


class Logits(NamedTuple):
    """What a student says of a batch, float32, one logit per task.

    Attributes:
        serving_BT: z_S, learns the labels (in the kd arm the teacher's prediction too).
        auxiliary_BT: z_D, learns the teacher's prediction; None in the arms without it.
        adapter_BT: z_D', learns the adapter's target; the same tensor as `auxiliary_BT` without a
            head of its own.
    """

    serving_BT: Tensor
    auxiliary_BT: Tensor | None
    adapter_BT: Tensor | None


class _ScaleGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, beta: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Tensor, Tensor],
        output: Tensor,
    ) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (beta,) = ctx.saved_tensors
        return gradients[0] * beta, None


def scale_gradient(x: Tensor, beta: Tensor) -> Tensor:
    """x unchanged to the bit; its gradient times `beta`, a tensor of no axes."""
    scaled: Tensor = _ScaleGradient.apply(x, beta)  # type: ignore[no-untyped-call]
    return scaled


class Student(nn.Module):
    """A network and the extra heads of its objective, each with one output per task. The foundation
    model is a student of labels alone."""

    def __init__(
        self,
        network: Network,
        objective: Objective,
        config: DistillationConfig,
        seed: int = 0,
    ) -> None:
        """`seed` makes the extra heads' weights; they depend on nothing else, and the network is
        taken as it is."""
        super().__init__()
        self.network = network
        self.objective = objective
        self.beta = torch.tensor(config.ah.beta)  # no buffer: bf16 engines would round it
        separate_head = objective is Objective.AH_SA and config.sa.separate_head
        self.auxiliary_head = (
            _extra_head(network, config.ah.mlp, seed, 1)
            if objective in (Objective.AH, Objective.AH_SA)
            else None
        )
        self.adapter_head = _extra_head(network, config.ah.mlp, seed, 2) if separate_head else None

    def forward(
        self,
        embedded_BRE: Tensor,
        dense_BD: Tensor,
        beta: Tensor | None = None,
    ) -> Logits:
        """Embedded features (B, R, E) and dense ones (B, D) to the logits of all heads. `beta`:
        instead of the config's, no axes.

        The gradient of the extra heads into the backbone, and through it into the tables, is
        multiplied by beta.
        """
        x_BH = self.network.features(embedded_BRE, dense_BD)
        serving_BT = self.network.head(x_BH)
        if self.auxiliary_head is None:
            return Logits(serving_BT, None, None)
        scaled_BH = scale_gradient(x_BH, self.beta if beta is None else beta)
        auxiliary_BT = self.auxiliary_head(scaled_BH)
        if self.objective is Objective.AH:
            return Logits(serving_BT, auxiliary_BT, None)
        adapter_BT = auxiliary_BT if self.adapter_head is None else self.adapter_head(scaled_BH)
        return Logits(serving_BT, auxiliary_BT, adapter_BT)


def _extra_head(
    network: Network,
    widths: Widths | tuple[()],
    seed: int,
    number: int,
) -> Head:
    """A head for the network's tasks, from a generator state of its own: one head's presence
    changes no other's weights."""
    final = network.head.mlp[-1]
    assert isinstance(final, nn.Linear), "a head ends in a linear layer"
    with seeded(1_000_003 * (seed + 1) + number):
        return Head(network.backbone.out_features, widths, final.out_features)
