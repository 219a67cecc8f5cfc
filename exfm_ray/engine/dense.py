"""The dense part of a model in DeepSpeed: ZeRO stage 0 to 3, fp32 or bf16."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from exfm_ray.config.trainer import TrainerConfig

GRADIENT_CLIP = 0.0  # DeepSpeed's value for "off"
NEVER_PRINT = 1 << 40  # steps between two log lines of DeepSpeed


def shard_dense(
    module: nn.Module,
    config: TrainerConfig,
    world: int,
) -> Any:
    """Wrap the dense part in a DeepSpeed engine with AdamW.

    Args:
        module: must not contain the embedding tables, because DeepSpeed would overwrite the shards
            of all workers with rank 0's.
        config: optimizer, ZeRO stage and precision.
        world: number of workers.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DS_ACCELERATOR", config.device)
    import deepspeed

    # Compiling this operator takes 40 s, and it brings nothing here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rates = config.optimizer
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=rates.dense_lr, weight_decay=rates.dense_weight_decay, fused=True
    )
    settings = {
        "train_micro_batch_size_per_gpu": max(config.batch_size // world, 1),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": GRADIENT_CLIP,
        "steps_per_print": NEVER_PRINT,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.precision == "bf16"},
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


def gathered_state(engine: Any) -> dict[str, Tensor]:
    """Return the whole state dict of the module on every worker, float32 on the CPU.

    ZeRO stage 3 gathers its partitions, so all workers must call this.
    """
    import deepspeed

    module: nn.Module = engine.module
    gathered: Any = nullcontext()
    if engine.zero_optimization_stage() == 3:
        gathered = deepspeed.zero.GatheredParameters(list(module.parameters()))
    state = {}
    with gathered:
        for name, tensor in module.state_dict().items():
            state[name] = tensor.detach().float().cpu().clone()
    return state
