"""The student adapter (ExFM, arXiv 2502.17494): corrects the teacher's prediction by the fresh labels of one vertical model.

On each batch, in this order: logits z_SA and from them `target_B` for the student, then a step of the adapter's own
optimizer on h(z_SA, y).
The other order lets the target contain the label it is meant to predict.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exfm_ray.config import SAConfig
from exfm_ray.models.layers import mlp_to, seeded

PROBABILITY_FLOOR = 1e-6
"""Teachers' probabilities are held this far from 0 and 1, so that their logits stay within +-13.8."""


class Adapter(nn.Module):
    """z_SA = logit(p) + MLP(p or logit(p)).

    The last layer starts at zero, so a fresh adapter repeats the teacher exactly: its first targets are the teacher's,
    not noise, and it learns only the correction. Without hidden widths and on the logit it is Platt scaling.
    """

    def __init__(self, config: SAConfig, seed: int = 0) -> None:
        super().__init__()
        self.on_logit = config.input == "logit"
        with seeded(seed):
            self.mlp = mlp_to(1, config.mlp, 1, gain=0.0)

    def forward(self, teacher_B: Tensor) -> Tensor:
        """The teacher's probabilities to logits, float32 (B,)."""
        probability_B = teacher_B.float().clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
        logit_B = torch.logit(probability_B)
        correction_B: Tensor = self.mlp((logit_B if self.on_logit else probability_B).unsqueeze(1)).squeeze(1)
        return logit_B + correction_B


def target_B(logit_B: Tensor) -> Tensor:
    """t = stopgrad(sigmoid(z_SA)) of the adapter's logits, computed before its update on the same batch."""
    return torch.sigmoid(logit_B.detach())
