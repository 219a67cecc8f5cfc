"""The dense part of a model in DeepSpeed: ZeRO stage 0 to 3, fp32 or bf16."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from exfm_ray.config.trainer import TrainerConfig

GRADIENT_CLIP = 0.0  # DeepSpeed's "off"


def shard_dense(
    module: nn.Module,
    config: TrainerConfig,
    world: int,
) -> Any:
    """Wrap `module` in a DeepSpeed engine with Adam. The embedding tables must not be part of it:
    DeepSpeed would broadcast rank 0's shard over the others'."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DS_ACCELERATOR", config.device)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # its compilation costs 40 s, its use nothing here
    )
    rates = config.optimizer
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=rates.dense_lr, weight_decay=rates.dense_weight_decay, fused=True
    )
    settings = {
        "train_micro_batch_size_per_gpu": max(config.batch_size // world, 1),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": GRADIENT_CLIP,
        "steps_per_print": 1 << 40,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.precision == "bf16"},
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


def gathered_state(engine: Any) -> dict[str, Tensor]:
    """The module's whole float32 state dict on the CPU, on every worker (ZeRO stage 3 gathers its
    partitions)."""
    import deepspeed

    module: nn.Module = engine.module
    context = (
        deepspeed.zero.GatheredParameters(list(module.parameters()))
        if engine.zero_optimization_stage() == 3
        else nullcontext()
    )
    with context:
        return {
            name: tensor.detach().float().cpu().clone()
            for name, tensor in module.state_dict().items()
        }
