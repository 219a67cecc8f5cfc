"""Settings of the interaction models, one class each. `docs/models.md` shows how to add a model.

Keys read like the papers: l, n_F, n_L, k (Wukong, arXiv 2403.02545). A `type` of the form
`my_module:MyModel` names a class outside this package: the module is imported when the setting is
validated, and the class's own `Config` validates the other settings.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Self,
    TypeAlias,
    get_args,
)

from pydantic import (
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from exfm_ray.base import FrozenModel, Name
from exfm_ray.errors import nearest

Widths = tuple[Annotated[int, Field(ge=1)], ...]


class BackboneConfig(FrozenModel):
    """Settings that every interaction model has; base of the settings of a model of your own."""

    dim: int = Field(
        16, ge=1, description="E, the width of an embedding row, in numbers; a multiple of 4."
    )
    embeddings: dict[Name, Annotated[int, Field(ge=1)]] = Field(
        {},
        description="Embedding table -> number of rows of width `dim` for each of its ids. Tables "
        "that are not listed have 1.",
    )
    init_std: float = Field(
        0.05, gt=0, description="Standard deviation of the initial values of an embedding row."
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of hidden units dropped in training, after each ReLU; 0: no dropout.",
    )
    type: str = Field(description="Selects the model.")

    @property
    def unpooled(self) -> int:
        """Number of values of each sequence feature that the model reads one by one.

        The newest value comes first. 0: the model reads the mean of all values.
        """
        return 0


class WukongConfig(BackboneConfig):
    """Wukong (arXiv 2403.02545): l layers of n_F + n_L rows with a rank-k projection."""

    type: Literal["wukong"] = Field("wukong", description="Selects this model.")
    l: int = Field(2, ge=1, description="Number of Wukong layers.")  # noqa: E741 - the paper's name
    n_F: int = Field(
        8, ge=0, description="Rows that the factorization machine block of a layer puts out."
    )
    n_L: int = Field(
        8, ge=0, description="Rows that the linear compression block of a layer puts out."
    )
    k: int = Field(
        8,
        ge=1,
        description="Columns of the projection. At most the number of rows that enter the first "
        "layer; a later layer with fewer rows uses fewer columns.",
    )
    projection: Literal["learnable", "attentive", "plain"] = Field(
        "learnable",
        description="Projection in the factorization machine. learnable: a learned matrix; "
        "attentive: a matrix computed from the example; plain: none, all pairs of rows (`k` is "
        "not used).",
    )
    attentive_rows: int = Field(
        4,
        ge=1,
        description="Rows to which an example is compressed before its projection is computed "
        "(projection: attentive).",
    )
    attentive_mlp: Widths = Field(
        (64,),
        description="Hidden widths of the MLP that computes the projection (projection: "
        "attentive).",
    )
    fmb_mlp: Widths = Field(
        (128,), description="Hidden widths of the MLP in each factorization machine block."
    )
    mlp: Widths = Field((128,), description="Hidden widths of the MLP after the last layer.")
    dense_rows: int = Field(
        2, ge=1, description="Rows of width `dim` into which the dense features are projected."
    )

    @model_validator(mode="after")
    def _rows(self) -> Self:
        if self.n_F + self.n_L == 0:
            raise ValueError(
                "n_F + n_L is 0: a Wukong layer needs rows; set n_F or n_L to 1 or more"
            )
        return self


class MLPConfig(BackboneConfig):
    """A multi-layer perceptron over the flattened embeddings and the dense features."""

    type: Literal["mlp"] = Field("mlp", description="Selects this model.")
    mlp: Widths = Field((64, 32), description="Hidden widths of the MLP.")


class DLRMConfig(BackboneConfig):
    """DLRM (arXiv 1906.00091): dot products of all pairs of embeddings, and a bottom MLP."""

    type: Literal["dlrm"] = Field("dlrm", description="Selects this model.")
    bottom_mlp: Widths = Field(
        (32,), description="Hidden widths of the MLP that turns the dense features into one row."
    )
    top_mlp: Widths = Field(
        (64, 32), description="Hidden widths of the MLP over the dot products and that row."
    )


class DCNv2Config(BackboneConfig):
    """DCN-V2 (arXiv 2008.13535), parallel form: full-rank cross layers beside an MLP."""

    type: Literal["dcnv2"] = Field("dcnv2", description="Selects this model.")
    cross_layers: int = Field(2, ge=1, description="Number of full-rank cross layers.")
    mlp: Widths = Field((64, 32), description="Hidden widths of the MLP beside the cross layers.")


class DeepFMConfig(BackboneConfig):
    """DeepFM (arXiv 1703.04247): a factorization machine beside an MLP."""

    type: Literal["deepfm"] = Field("deepfm", description="Selects this model.")
    mlp: Widths = Field(
        (64, 32), description="Hidden widths of the MLP beside the factorization machine."
    )


class MaskNetConfig(BackboneConfig):
    """MaskNet (arXiv 2102.07619), parallel form: blocks with masks computed from the example."""

    type: Literal["masknet"] = Field("masknet", description="Selects this model.")
    blocks: int = Field(3, ge=1, description="Number of mask blocks side by side.")
    block_width: int = Field(32, ge=1, description="Numbers that each block puts out.")
    mask_mlp: Widths = Field(
        (64,), description="Hidden widths of the MLP that computes a block's mask."
    )
    mlp: Widths = Field((64, 32), description="Hidden widths of the MLP after the blocks.")


class FinalMLPConfig(BackboneConfig):
    """FinalMLP (arXiv 2304.00902): two gated MLPs, fused by a bilinear form with several heads."""

    type: Literal["finalmlp"] = Field("finalmlp", description="Selects this model.")
    mlp_1: Widths = Field((64, 32), min_length=1, description="Hidden widths of the first MLP.")
    mlp_2: Widths = Field((64,), min_length=1, description="Hidden widths of the second MLP.")
    gate_mlp: Widths | tuple[()] = Field(
        (), description="Hidden widths of the MLPs of the two feature gates; empty: no gates."
    )
    heads: int = Field(
        1,
        ge=1,
        description="Heads of the bilinear fusion; must divide the last widths of `mlp_1` and "
        "`mlp_2`.",
    )

    @model_validator(mode="after")
    def _heads(self) -> Self:
        for key, width in (("mlp_1", self.mlp_1[-1]), ("mlp_2", self.mlp_2[-1])):
            if width % self.heads:
                raise ValueError(
                    f"heads is {self.heads}, which does not divide {width}, the last width of {key}"
                )
        return self


class DINConfig(BackboneConfig):
    """DIN (arXiv 1706.06978): sequence features are read with attention to a target.

    The target of a sequence feature is the single-valued feature whose table it shares.
    """

    type: Literal["din"] = Field("din", description="Selects this model.")
    sequence_length: int = Field(
        20, ge=1, description="Values of each sequence feature that are read, the newest ones."
    )
    attention_mlp: Widths = Field(
        (32,), description="Hidden widths of the MLP that weighs a value of a sequence."
    )
    mlp: Widths = Field((64, 32), description="Hidden widths of the MLP after the attention.")

    @property
    def unpooled(self) -> int:
        return self.sequence_length


_ModelConfigs = (
    WukongConfig
    | MLPConfig
    | DLRMConfig
    | DCNv2Config
    | DeepFMConfig
    | MaskNetConfig
    | FinalMLPConfig
    | DINConfig
)
MODEL_TYPES = tuple(config.model_fields["type"].default for config in get_args(_ModelConfigs))
"""Types of the built-in models."""

CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""The form of a type that names a class outside this package, `my_package.my_module:MyModel`."""

_config_of_class: dict[type, type[BackboneConfig]] = {}
_config_of_name: dict[str, type[BackboneConfig]] = {}


def register_config(config_class: type[BackboneConfig], model_class: type) -> None:
    """Make `config_class` the settings of `model_class`.

    If the field `type` of `config_class` has a default, that name selects the model in a config.

    Raises:
        ValueError: the name belongs to another model already.
    """
    name = config_class.model_fields["type"].default
    if isinstance(name, str):
        if name in MODEL_TYPES or _config_of_name.get(name, config_class) is not config_class:
            raise ValueError(f"model type '{name}' exists already; choose another name")
        _config_of_name[name] = config_class
    _config_of_class[model_class] = config_class


def registered_types() -> tuple[str, ...]:
    """Names that `register_config` added in this process."""
    return tuple(_config_of_name)


def import_model(class_path: str) -> type:
    """Import the model class that a type such as `my_module:MyModel` names.

    Raises:
        ValueError: the module cannot be imported or has no such class.
    """
    module_name, _, class_name = class_path.partition(":")
    if not CLASS_PATH.fullmatch(class_path):
        raise ValueError(f"type '{class_path}' is not of the form my_module:MyModel")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"type '{class_path}': cannot import module '{module_name}' "
            f"({type(error).__name__}: {error}); correct its name, or add its folder to PYTHONPATH"
        ) from error

    model_class = getattr(module, class_name, None)
    if not isinstance(model_class, type):
        classes = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(
            f"type '{class_path}': module '{module_name}' has no class '{class_name}'."
            f"{nearest(class_name, classes)}"
        )
    return model_class


def custom_config_class(type_name: str) -> type[BackboneConfig] | None:
    """Find the settings class of a model that is not built in.

    Args:
        type_name: a registered name, or a class path, whose module is then imported.

    Returns:
        None if `type_name` is neither.

    Raises:
        ValueError: the class cannot be imported or declares no settings.
    """
    if type_name in _config_of_name:
        return _config_of_name[type_name]
    if ":" not in type_name:
        return None

    model_class = import_model(type_name)
    config_class = _config_of_class.get(model_class) or getattr(model_class, "Config", None)
    if not (isinstance(config_class, type) and issubclass(config_class, BackboneConfig)):
        raise ValueError(
            f"type '{type_name}': the class declares no settings; give it a class attribute "
            "`Config` derived from exfm_ray.config.models.BackboneConfig"
        )
    return config_class


def _validate_model(value: Any, built_in: ValidatorFunctionWrapHandler) -> BackboneConfig:
    """Validate a model of the user's own with its own settings class, and others as built-in."""
    is_built_in = type(value) in get_args(_ModelConfigs)
    if isinstance(value, BackboneConfig) and not is_built_in:
        return value

    type_name = value.get("type") if isinstance(value, Mapping) else None
    config_class = custom_config_class(type_name) if isinstance(type_name, str) else None
    if config_class is None or not isinstance(type_name, str):
        built_in_config: BackboneConfig = built_in(value)
        return built_in_config

    # As an entry of a dict, so that errors name the type in their path as those of a union do.
    by_type = TypeAdapter(dict[str, config_class]).validate_python({type_name: value})  # type: ignore[valid-type]
    custom_config: BackboneConfig = by_type[type_name]
    return custom_config


if TYPE_CHECKING:
    ModelConfig: TypeAlias = BackboneConfig
else:
    ModelConfig = Annotated[
        _ModelConfigs,
        Field(discriminator="type"),
        WrapValidator(_validate_model),
        SerializeAsAny(),
    ]
