"""Sizes of the interaction models, one config each. `docs/models.md` shows how to add one.

Keys read like the papers: l, n_F, n_L, k (Wukong, arXiv 2403.02545).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from exfm_ray.base import FrozenModel, Name

Widths = tuple[Annotated[int, Field(ge=1)], ...]


class BackboneConfig(FrozenModel):
    """Settings that every interaction model has."""

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
ModelConfig = Annotated[_ModelConfigs, Field(discriminator="type")]
MODEL_TYPES = tuple(config.model_fields["type"].default for config in get_args(_ModelConfigs))
