"""The student adapter (ExFM, arXiv 2502.17494): corrects the teacher's prediction by the fresh
labels of one vertical model.

    z_SA = logit(p) + MLP(p or logit(p))        p the teacher's probability
    t    = stopgrad(sigmoid(z_SA))              the student's target

On each batch, the order is: compute z_SA, compute `target_BT` for the student, take a step of the
adapter's own optimizer on h(z_SA, y). In the other order, the target would contain the label that
it is meant to predict.

Shape suffixes: B batch, T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exfm_ray.config.distillation import SAConfig
from exfm_ray.models.layers import mlp_to, seeded

PROBABILITY_FLOOR = 1e-6
"""Smallest distance of a teacher's probability from 0 and 1, so that logits stay within +-13.8."""


class Adapter(nn.Module):
    """Computes z_SA with a separate MLP for every task.

    The last layer starts at zero, so a fresh adapter repeats the teacher exactly: its first targets
    are the teacher's, not noise, and it learns only the correction. On the logit and without hidden
    widths it is Platt scaling. Every task's MLP starts from the same `seed`, so what is learned for
    a task does not depend on other tasks.
    """

    def __init__(
        self,
        config: SAConfig,
        tasks: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.on_logit = config.input == "logit"
        mlps = [_mlp(config, seed) for _ in range(tasks)]
        self.mlps = nn.ModuleList(mlps)

    def forward(self, teacher_BT: Tensor) -> Tensor:
        """Map the teacher's probabilities (B, T) to float32 logits (B, T)."""
        probability_BT = teacher_BT.float().clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
        logit_BT = torch.logit(probability_BT)

        inputs_BT = logit_BT if self.on_logit else probability_BT
        inputs_B1 = torch.split(inputs_BT, 1, dim=1)
        corrections_B1 = []
        for mlp, input_B1 in zip(self.mlps, inputs_B1, strict=True):
            corrections_B1.append(mlp(input_B1))
        return logit_BT + torch.cat(corrections_B1, dim=1)


def _mlp(config: SAConfig, seed: int) -> nn.Sequential:
    with seeded(seed):
        return mlp_to(1, config.mlp, 1, gain=0.0)


def target_BT(logit_BT: Tensor) -> Tensor:
    """Compute t = stopgrad(sigmoid(z_SA)).

    Args:
        logit_BT: the adapter's logits, computed before its update on the same batch.
    """
    return torch.sigmoid(logit_BT.detach())
