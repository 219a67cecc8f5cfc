"""A network with the extra heads of its objective (ExFM, arXiv 2502.17494). Only the network is
served.

Shape suffixes as in `exfm_ray.models.backbone`; T tasks.
"""

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
    """The outputs of a student for a batch, float32, one logit per task.

    Attributes:
        serving_BT: z_S, which learns the labels (in the kd arm the teacher's prediction, too).
        auxiliary_BT: z_D, which learns the teacher's prediction; None in arms without it.
        adapter_BT: z_D', which learns the adapter's target; the same tensor as `auxiliary_BT`
            unless the adapter's target has a separate head.
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
        (gradient,) = gradients
        return gradient * beta, None


def scale_gradient(x: Tensor, beta: Tensor) -> Tensor:
    """Return x unchanged and multiply its gradient by `beta`, a tensor without axes."""
    scaled: Tensor = _ScaleGradient.apply(x, beta)  # type: ignore[no-untyped-call]
    return scaled


class Student(nn.Module):
    """A network and the extra heads of its objective, each with one output per task.

    The foundation model is a student that learns from labels alone.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        config: DistillationConfig,
        seed: int = 0,
    ) -> None:
        """Add the extra heads to a network, which stays unchanged.

        Args:
            network: the network.
            objective: the objective.
            config: widths of the extra heads, and beta.
            seed: seed of the extra heads' weights, which depend on nothing else.
        """
        super().__init__()
        self.network = network
        self.objective = objective
        self.beta = torch.tensor(config.ah.beta)  # not a buffer: bf16 engines would round it

        has_auxiliary_head = objective in (Objective.AH, Objective.AH_SA)
        has_adapter_head = objective is Objective.AH_SA and config.sa.separate_head
        widths = config.ah.mlp
        self.auxiliary_head = (
            _extra_head(network, widths, seed, number=1) if has_auxiliary_head else None
        )
        self.adapter_head = (
            _extra_head(network, widths, seed, number=2) if has_adapter_head else None
        )

    def forward(
        self,
        embedded_BRE: Tensor,
        dense_BD: Tensor,
        beta: Tensor | None = None,
    ) -> Logits:
        """Compute the logits of all heads.

        Args:
            embedded_BRE: embedded rows.
            dense_BD: dense features.
            beta: factor of the gradient that the extra heads send into the backbone, and through
                it into the tables; a tensor without axes, None for the config's.
        """
        x_BH = self.network.features(embedded_BRE, dense_BD)
        serving_BT = self.network.head(x_BH)
        if self.auxiliary_head is None:
            return Logits(serving_BT, None, None)

        scaled_BH = scale_gradient(x_BH, self.beta if beta is None else beta)
        auxiliary_BT = self.auxiliary_head(scaled_BH)
        if self.objective is Objective.AH:
            return Logits(serving_BT, auxiliary_BT, None)
        if self.adapter_head is None:
            return Logits(serving_BT, auxiliary_BT, auxiliary_BT)

        adapter_BT = self.adapter_head(scaled_BH)
        return Logits(serving_BT, auxiliary_BT, adapter_BT)


def _extra_head(
    network: Network,
    widths: Widths | tuple[()],
    seed: int,
    number: int,
) -> Head:
    """Build a head for the network's tasks from its own generator state.

    So the presence of one head does not change the weights of another.
    """
    last = network.head.mlp[-1]
    assert isinstance(last, nn.Linear), "a head ends in a linear layer"
    tasks = last.out_features
    with seeded(1_000_003 * (seed + 1) + number):
        return Head(network.backbone.out_features, widths, tasks)
