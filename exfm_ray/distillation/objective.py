"""The losses of the arms (ExFM, arXiv 2502.17494): pure functions of tensors, one loss per example.

    labels   h(z_S, y)
    kd       h(z_S, y) + w h(z_S, p)
    ah       h(z_S, y) + w h(z_D, min(1, alpha p))
    ah_sa    h(z_S, y) + w h(z_D, min(1, alpha p)) + sa.w h(z_D', t)

y is the label, p the teacher's probability, t the adapter's target, z_S, z_D and z_D' the logits of
the student's heads, and h the binary cross-entropy of a logit against a target in [0, 1], without
temperature. Every term is the mean over the tasks, so that the scale of the loss does not depend on
their number. The student scales gradients by beta; the objective does not.

Shape suffixes: B batch, T tasks. Several students that learn together add axes in front.
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
    """Weights of the terms.

    They are numbers, or tensors that broadcast against (..., B, T) if several students learn
    together.

    Attributes:
        kd_w: w of the arm kd.
        ah_w: w of the auxiliary head.
        ah_alpha: factor of the teacher's probability for the auxiliary head.
        sa_w: weight of the adapter's target.
    """

    kd_w: float | Tensor
    ah_w: float | Tensor
    ah_alpha: float | Tensor
    sa_w: float | Tensor

    @classmethod
    def from_config(cls, config: DistillationConfig) -> Self:
        """Read the weights from the config."""
        return cls(
            kd_w=config.kd.w,
            ah_w=config.ah.w,
            ah_alpha=config.ah.alpha,
            sa_w=config.sa.w,
        )


def bce_BT(logit_BT: Tensor, target_BT: Tensor) -> Tensor:
    """Compute h(z, y) = log(1 + e^z) - y z of each example and task in nats; y may be soft."""
    return F.binary_cross_entropy_with_logits(
        logit_BT, target_BT.expand_as(logit_BT), reduction="none"
    )


def label_bce_BT(logit_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Compute h(z, y); 0 where the label is NaN.

    A correction (see `data.labels.corrections`) has the label of one task only. Its loss is
    h(z, 1) - h(z, 0) = -z: the example was learned as a 0 before, and this takes it back. If it
    were learned as a plain 1 in addition to that 0, the example would count twice, and the learned
    rate would be p / (1 + the fraction of all examples that are corrected).
    """
    is_missing_BT = labels_BT.isnan()
    known_BT = labels_BT.nan_to_num()
    is_corrected_BT = known_BT == CORRECTED
    loss_BT = torch.where(is_corrected_BT, -logit_BT, bce_BT(logit_BT, known_BT))
    return torch.where(is_missing_BT, 0.0, loss_BT)


def labels_objective_B(logits_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Compute the mean of h over the tasks, per example."""
    loss_BT = label_bce_BT(logits_BT, labels_BT)
    return loss_BT.mean(dim=-1)


def objective_B(
    objective: Objective,
    weights: Weights,
    logits: Logits,
    labels_BT: Tensor,
    teacher_BT: Tensor | None,
    target_BT: Tensor | None,
) -> Tensor:
    """Compute the objective's loss of each example.

    Args:
        objective: the objective.
        weights: weights of its terms.
        logits: logits of the student's heads.
        labels_BT: labels, 0 or 1; NaN where unknown.
        teacher_BT: the teacher's probabilities; None if the window has no supervision, and every
            objective is then its label term alone.
        target_BT: the adapter's targets, which ah_sa needs if there is a teacher.
    """
    loss_BT = label_bce_BT(logits.serving_BT, labels_BT)
    if teacher_BT is None or objective is Objective.LABELS:
        return loss_BT.mean(dim=-1)

    if objective is Objective.KD:
        kd_BT = bce_BT(logits.serving_BT, teacher_BT)
        loss_BT = loss_BT + weights.kd_w * kd_BT
        return loss_BT.mean(dim=-1)

    assert logits.auxiliary_BT is not None, f"{objective} has an auxiliary head"
    scaled_teacher_BT = (weights.ah_alpha * teacher_BT).clamp(max=1.0)
    auxiliary_BT = bce_BT(logits.auxiliary_BT, scaled_teacher_BT)
    loss_BT = loss_BT + weights.ah_w * auxiliary_BT
    if objective is Objective.AH:
        return loss_BT.mean(dim=-1)

    assert logits.adapter_BT is not None, f"{objective} has a logit for the adapter's target"
    assert target_BT is not None, f"{objective} learns the adapter's target"
    adapter_BT = bce_BT(logits.adapter_BT, target_BT)
    loss_BT = loss_BT + weights.sa_w * adapter_BT
    return loss_BT.mean(dim=-1)
