"""Which settings class builds which interaction model, and the models that users add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exfm_ray.config.models import (
    BackboneConfig,
    DCNv2Config,
    DeepFMConfig,
    DINConfig,
    DLRMConfig,
    FinalMLPConfig,
    MaskNetConfig,
    MLPConfig,
    ModelConfig,
    WukongConfig,
    import_model,
    register_config,
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

BackboneFactory = Callable[[Any, Inputs], Backbone]

BACKBONES: dict[type, BackboneFactory] = {
    WukongConfig: Wukong,
    MLPConfig: MLP,
    DLRMConfig: DLRM,
    DCNv2Config: DCNv2,
    DeepFMConfig: DeepFM,
    MaskNetConfig: MaskNet,
    FinalMLPConfig: FinalMLP,
    DINConfig: DIN,
}
"""The built-in models."""

_registered: dict[type, type[Backbone]] = {}


def register_model(config_class: type[BackboneConfig], backbone_class: type[Backbone]) -> None:
    """Add an interaction model of your own.

    A class attribute `Config` does the same for a model that a config names by its class path,
    `type: my_module:MyModel`. Call this function where the settings class stands elsewhere, or
    where the field `type` of the settings class has a default: that short name then selects the
    model in every process that has imported the module of the call.

    Args:
        config_class: settings of the model, derived from `BackboneConfig`.
        backbone_class: the model, constructed as `backbone_class(config, inputs)`.

    Raises:
        ValueError: another model has the short name.
    """
    register_config(config_class, backbone_class)
    _registered[config_class] = backbone_class


def build_backbone(config: ModelConfig, inputs: Inputs) -> Backbone:
    """Build the interaction model of `config`.

    Raises:
        ValueError: its sizes do not fit the inputs, or `config.type` names no backbone.
    """
    factory = BACKBONES.get(type(config)) or _custom_backbone(config)
    return factory(config, inputs)


def _custom_backbone(config: ModelConfig) -> type[Backbone]:
    backbone_class = _registered.get(type(config)) or import_model(config.type)
    if not issubclass(backbone_class, Backbone):
        raise ValueError(
            f"model.type is {config.type}, which is not an interaction model; "
            "derive the class from exfm_ray.models.backbone.Backbone"
        )
    return backbone_class
