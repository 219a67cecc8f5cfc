"""Floating-point operations of the interaction models, counted over the model itself.

Only matrix products count, a multiply and an add as two operations; layer norms, activations, sums
and lookups do not.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from exfm_ray.config.models import ModelConfig
from exfm_ray.models.layout import Inputs
from exfm_ray.models.network import Head
from exfm_ray.models.registry import build_backbone


def forward_flops(config: ModelConfig, inputs: Inputs) -> int:
    """Count the operations for one example in the interaction model and a linear head of one task.

    The weights take no memory.

    Raises:
        ValueError: the sizes of `config` do not fit `inputs`.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        backbone = build_backbone(config, inputs)
        head = Head(backbone.out_features, (), outputs=1)

        embedded_BRE = torch.empty(1, inputs.rows, config.dim)
        dense_BD = torch.empty(1, inputs.dense)
        x_BH = backbone(embedded_BRE, dense_BD)
        head(x_BH)
    flops: int = counter.get_total_flops()
    return flops


def training_flops(config: ModelConfig, inputs: Inputs) -> int:
    """Count the operations for one example, forward and backward.

    The backward pass costs twice the forward pass (arXiv 2001.08361, 2.1). This is exact for all
    models here except for the gradient of the dense features, which nothing reads: a model with
    an MLP for dense features alone (Wukong, DLRM) skips that product.
    """
    return 3 * forward_flops(config, inputs)
