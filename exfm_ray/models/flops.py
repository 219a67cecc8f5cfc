"""Floating-point operations of the interaction models, counted over the model itself.

Only matrix products count, a multiply and an add as two operations; layer norms, activations, sums
and look-ups do not.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from exfm_ray.config.models import ModelConfig
from exfm_ray.models.layout import Inputs
from exfm_ray.models.network import Head
from exfm_ray.models.registry import build_backbone


def forward_flops(config: ModelConfig, inputs: Inputs) -> int:
    """Operations for one example, of the interaction model and a linear head of one task. Needs no
    memory for the weights.

    Raises:
        ValueError: the sizes of `config` do not fit `inputs`.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        backbone = build_backbone(config, inputs)
        Head(backbone.out_features, (), outputs=1)(
            backbone(torch.empty(1, inputs.rows, config.dim), torch.empty(1, inputs.dense))
        )
    flops: int = counter.get_total_flops()
    return flops


def training_flops(config: ModelConfig, inputs: Inputs) -> int:
    """Operations for one example, forward and backward: the backward pass costs twice the forward
    pass (arXiv 2001.08361, 2.1).

    Exact for all models here, but for the gradient of the dense features, which nobody needs: an
    MLP of their own (Wukong, DLRM) goes without that product.
    """
    return 3 * forward_flops(config, inputs)
