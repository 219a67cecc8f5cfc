"""What each arm minimises (ExFM, arXiv 2502.17494): pure functions of tensors, one loss per example.

    labels   h(z_S, y)
    kd       h(z_S, y) + w h(z_S, p)
    ah       h(z_S, y) + w h(z_D, min(1, alpha p))
    ah_sa    h(z_S, y) + w h(z_D, min(1, alpha p)) + sa.w h(z_D', t)

y label, p the teacher's probability, t the adapter's target; h binary cross-entropy of a logit against a target in [0, 1],
without temperature. The scaling of gradients by beta is the student's, not the objective's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from exfm_ray.config import Arm, DistillationConfig
from exfm_ray.distillation.student import Logits


def bce_B(logit_B: Tensor, target_B: Tensor) -> Tensor:
    """h(z, y) of each example in nats: log(1 + e^z) - y z; targets may be soft."""
    return F.binary_cross_entropy_with_logits(logit_B, target_B, reduction="none")


def labels_objective_B(logits_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean of h over the tasks, per example: the number of tasks does not change the scale of the loss."""
    return F.binary_cross_entropy_with_logits(logits_BT, labels_BT, reduction="none").mean(dim=1)


def objective_B(
    arm: Arm, config: DistillationConfig, logits: Logits, label_B: Tensor, teacher_B: Tensor | None, target_B: Tensor | None
) -> Tensor:
    """The arm's loss of each example of a one-task student.

    `teacher_B` holds the teacher's probabilities; None, where the window has no supervision, leaves the label term to
    every arm. `target_B` holds the adapter's targets, which the ah_sa arm needs whenever there is a teacher.
    """
    assert logits.serving_BT.shape[1] == 1, "a vertical model has one task"
    serving_B = logits.serving_BT[:, 0]
    loss_B = bce_B(serving_B, label_B)
    if teacher_B is None or arm is Arm.LABELS:
        return loss_B
    if arm is Arm.KD:
        return loss_B + config.kd.w * bce_B(serving_B, teacher_B)
    assert logits.auxiliary_B is not None, f"the {arm} arm has an auxiliary head"
    loss_B = loss_B + config.ah.w * bce_B(logits.auxiliary_B, (config.ah.alpha * teacher_B).clamp(max=1.0))
    if arm is Arm.AH:
        return loss_B
    assert logits.adapter_B is not None and target_B is not None, f"the {arm} arm learns the adapter's target"
    return loss_B + config.sa.w * bce_B(logits.adapter_B, target_B)
