"""What the arms minimise (ExFM, arXiv 2502.17494): pure functions of tensors, one loss per example.

    labels   h(z_S, y)
    kd       h(z_S, y) + w h(z_S, p)
    ah       h(z_S, y) + w h(z_D, min(1, alpha p))
    ah_sa    h(z_S, y) + w h(z_D, min(1, alpha p)) + sa.w h(z_D', t)

y label, p the teacher's probability, t the adapter's target; h binary cross-entropy of a logit
against a target in [0, 1], without temperature. Of several tasks every term is the mean, so that
the scale of the loss does not move with their number. The scaling of gradients by beta is the
student's, not the objective's.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from exfm_ray.config.arms import Objective
from exfm_ray.config.distillation import DistillationConfig
from exfm_ray.data.labels.corrections import CORRECTED
from exfm_ray.distillation.student import Logits


class Weights(NamedTuple):
    """Weights of the terms: numbers, or tensors that broadcast against (..., B, T) where several
    students learn together."""

    kd_w: float | Tensor
    ah_w: float | Tensor
    ah_alpha: float | Tensor
    sa_w: float | Tensor

    @classmethod
    def from_config(cls, config: DistillationConfig) -> Self:
        """The config's."""
        return cls(config.kd.w, config.ah.w, config.ah.alpha, config.sa.w)


def bce_BT(logit_BT: Tensor, target_BT: Tensor) -> Tensor:
    """h(z, y) of each example and task in nats: log(1 + e^z) - y z; targets may be soft."""
    return F.binary_cross_entropy_with_logits(
        logit_BT, target_BT.expand_as(logit_BT), reduction="none"
    )


def label_bce_BT(logit_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """h(z, y); 0 where the label is NaN, for a correction (see `data.corrections`) tells the label
    of one task only.

    Of a correction it is h(z, 1) - h(z, 0) = -z: the example was learnt as a 0 before, and this
    takes it back. Learnt as a plain 1 beside that 0, an example would count twice, and the rate
    that is learnt would be p / (1 + the share of all examples that is corrected).
    """
    known_BT = labels_BT.nan_to_num()
    loss_BT = torch.where(known_BT == CORRECTED, -logit_BT, bce_BT(logit_BT, known_BT))
    return torch.where(labels_BT.isnan(), 0.0, loss_BT)


def labels_objective_B(logits_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean of h over the tasks, per example."""
    return label_bce_BT(logits_BT, labels_BT).mean(dim=-1)


def objective_B(
    objective: Objective,
    weights: Weights,
    logits: Logits,
    labels_BT: Tensor,
    teacher_BT: Tensor | None,
    target_BT: Tensor | None,
) -> Tensor:
    """The objective's loss of each example.

    `teacher_BT` holds the teacher's probabilities; None, where the window has no supervision,
    leaves the label term to all of them. `target_BT` holds the adapter's targets, which ah_sa needs
    whenever there is a teacher.
    """
    loss_BT = label_bce_BT(logits.serving_BT, labels_BT)
    if teacher_BT is None or objective is Objective.LABELS:
        return loss_BT.mean(dim=-1)
    if objective is Objective.KD:
        return (loss_BT + weights.kd_w * bce_BT(logits.serving_BT, teacher_BT)).mean(dim=-1)
    assert logits.auxiliary_BT is not None, f"{objective} has an auxiliary head"
    loss_BT = loss_BT + weights.ah_w * bce_BT(
        logits.auxiliary_BT, (weights.ah_alpha * teacher_BT).clamp(max=1.0)
    )
    if objective is Objective.AH:
        return loss_BT.mean(dim=-1)
    assert logits.adapter_BT is not None and target_BT is not None, (
        f"{objective} learns the adapter's target"
    )
    return (loss_BT + weights.sa_w * bce_BT(logits.adapter_BT, target_BT)).mean(dim=-1)
