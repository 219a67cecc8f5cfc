"""Which config makes which interaction model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exfm_ray.config.models import (
    DCNv2Config,
    DeepFMConfig,
    DINConfig,
    DLRMConfig,
    FinalMLPConfig,
    MaskNetConfig,
    MLPConfig,
    ModelConfig,
    WukongConfig,
)
from exfm_ray.models.backbone import Backbone
from exfm_ray.models.dcnv2 import DCNv2
from exfm_ray.models.deepfm import DeepFM
from exfm_ray.models.din import DIN
from exfm_ray.models.dlrm import DLRM
from exfm_ray.models.finalmlp import FinalMLP
from exfm_ray.models.layout import Inputs
from exfm_ray.models.masknet import MaskNet
from exfm_ray.models.mlp import MLP
from exfm_ray.models.wukong import Wukong

BACKBONES: dict[type, Callable[[Any, Inputs], Backbone]] = {
    WukongConfig: Wukong,
    MLPConfig: MLP,
    DLRMConfig: DLRM,
    DCNv2Config: DCNv2,
    DeepFMConfig: DeepFM,
    MaskNetConfig: MaskNet,
    FinalMLPConfig: FinalMLP,
    DINConfig: DIN,
}


def build_backbone(config: ModelConfig, inputs: Inputs) -> Backbone:
    """The interaction model of `config`. ValueError where its sizes do not fit the inputs."""
    return BACKBONES[type(config)](config, inputs)
