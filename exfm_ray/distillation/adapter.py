"""The student adapter (ExFM, arXiv 2502.17494): corrects the teacher's prediction by the fresh
labels of one vertical model.

On each batch, in this order: logits z_SA and from them `target_BT` for the student, then a step of
the adapter's own optimizer on h(z_SA, y). The other order lets the target contain the label it is
meant to predict.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exfm_ray.config.distillation import SAConfig
from exfm_ray.models.layers import mlp_to, seeded

PROBABILITY_FLOOR = 1e-6
"""Teachers' probabilities are held this far from 0 and 1, so that their logits stay within
+-13.8."""


class Adapter(nn.Module):
    """z_SA = logit(p) + MLP(p or logit(p)), an MLP of its own for every task.

    The last layer starts at zero, so a fresh adapter repeats the teacher exactly: its first targets
    are the teacher's, not noise, and it learns only the correction. Without hidden widths and on
    the logit it is Platt scaling. Every task's MLP starts from the same `seed`: what is learnt for
    a task depends on no other task.
    """

    def __init__(
        self,
        config: SAConfig,
        tasks: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.on_logit = config.input == "logit"
        self.mlps = nn.ModuleList(_mlp(config, seed) for _ in range(tasks))

    def forward(self, teacher_BT: Tensor) -> Tensor:
        """The teacher's probabilities (B, T) to logits, float32 (B, T)."""
        probability_BT = teacher_BT.float().clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
        logit_BT = torch.logit(probability_BT)
        inputs_BT = logit_BT if self.on_logit else probability_BT
        corrections_B1 = [
            mlp(input_B1)
            for mlp, input_B1 in zip(self.mlps, torch.split(inputs_BT, 1, dim=1), strict=True)
        ]
        return logit_BT + torch.cat(corrections_B1, dim=1)


def _mlp(config: SAConfig, seed: int) -> nn.Sequential:
    with seeded(seed):
        return mlp_to(1, config.mlp, 1, gain=0.0)


def target_BT(logit_BT: Tensor) -> Tensor:
    """t = stopgrad(sigmoid(z_SA)) of the adapter's logits, computed before its update on the same
    batch."""
    return torch.sigmoid(logit_BT.detach())
