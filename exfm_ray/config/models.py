"""Sizes of the interaction models, one config each. `docs/models.md` shows how to add one.

Keys read like the papers: l, n_F, n_L, k (Wukong, arXiv 2403.02545).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from exfm_ray.base import FrozenModel, Name

Widths = tuple[Annotated[int, Field(ge=1)], ...]


class BackboneConfig(FrozenModel):
    """What every interaction model has."""

    dim: int = Field(16, ge=1, description="E, the width of an embedded row")
    embeddings: dict[Name, Annotated[int, Field(ge=1)]] = Field(
        {},
        description="embedding table -> how many rows of width `dim` each of its ids has; 1 where it is not named",
    )
    init_std: float = Field(0.05, gt=0, description="standard deviation of a fresh embedding row")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of hidden units left out in training, after each ReLU"
    )

    @property
    def unpooled(self) -> int:
        """Values of each sequence feature that the model reads one by one, the newest first; 0:
        their mean."""
        return 0


class WukongConfig(BackboneConfig):
    """Wukong (arXiv 2403.02545): l layers of n_F + n_L rows with a rank-k projection; MLP widths of
    FMB and head."""

    type: Literal["wukong"] = "wukong"
    l: int = Field(2, ge=1)  # noqa: E741 - the paper's own name
    n_F: int = Field(8, ge=0)
    n_L: int = Field(8, ge=0)
    k: int = Field(
        8,
        ge=1,
        description="columns of the projection, at most the rows of the first layer's input; fewer in a layer with fewer",
    )
    projection: Literal["learnable", "attentive", "plain"] = Field(
        "learnable",
        description="of FM: a learnable matrix, one computed from the example, or none (all pairs of rows; k is not used)",
    )
    attentive_rows: int = Field(
        4,
        ge=1,
        description="rows to which the example is compressed before the attentive projection is computed",
    )
    attentive_mlp: Widths = (64,)
    fmb_mlp: Widths = (128,)
    mlp: Widths = (128,)
    dense_rows: int = Field(2, ge=1, description="rows that the dense features become")

    @model_validator(mode="after")
    def _rows(self) -> Self:
        if self.n_F + self.n_L == 0:
            raise ValueError(
                "n_F + n_L is 0: a Wukong layer needs rows; set n_F or n_L to 1 or more"
            )
        return self


class MLPConfig(BackboneConfig):
    """A multi-layer perceptron over the flattened embeddings and the dense features."""

    type: Literal["mlp"] = "mlp"
    mlp: Widths = (64, 32)


class DLRMConfig(BackboneConfig):
    """DLRM (arXiv 1906.00091): dot products of all pairs of embeddings, dense features through a
    bottom MLP."""

    type: Literal["dlrm"] = "dlrm"
    bottom_mlp: Widths = (32,)
    top_mlp: Widths = (64, 32)


class DCNv2Config(BackboneConfig):
    """DCN-V2 (arXiv 2008.13535), parallel form: full-rank cross layers beside an MLP."""

    type: Literal["dcnv2"] = "dcnv2"
    cross_layers: int = Field(2, ge=1)
    mlp: Widths = (64, 32)


class DeepFMConfig(BackboneConfig):
    """DeepFM (arXiv 1703.04247): a factorization machine beside an MLP."""

    type: Literal["deepfm"] = "deepfm"
    mlp: Widths = (64, 32)


class MaskNetConfig(BackboneConfig):
    """MaskNet (arXiv 2102.07619), parallel form: blocks whose masks are computed from the example,
    then an MLP."""

    type: Literal["masknet"] = "masknet"
    blocks: int = Field(3, ge=1)
    block_width: int = Field(32, ge=1)
    mask_mlp: Widths = (64,)
    mlp: Widths = (64, 32)


class FinalMLPConfig(BackboneConfig):
    """FinalMLP (arXiv 2304.00902): two gated MLPs, fused by a bilinear form with several heads."""

    type: Literal["finalmlp"] = "finalmlp"
    mlp_1: Widths = Field((64, 32), min_length=1)
    mlp_2: Widths = Field((64,), min_length=1)
    gate_mlp: Widths | tuple[()] = Field(
        (), description="widths of the two feature gates; empty: no gates"
    )
    heads: int = Field(
        1, ge=1, description="of the bilinear fusion; divides the last widths of mlp_1 and mlp_2"
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
    """DIN (arXiv 1706.06978): each sequence feature is read with attention to the single-valued
    feature whose table it shares."""

    type: Literal["din"] = "din"
    sequence_length: int = Field(
        20, ge=1, description="values of a sequence that are read, the newest ones"
    )
    attention_mlp: Widths = (32,)
    mlp: Widths = (64, 32)

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
ModelConfig = Annotated[_ModelConfigs, Field(discriminator="type")]
MODEL_TYPES = tuple(config.model_fields["type"].default for config in get_args(_ModelConfigs))
