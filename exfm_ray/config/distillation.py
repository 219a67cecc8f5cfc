"""How the arms use the teacher, one section per method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from exfm_ray.base import FrozenModel, Name
from exfm_ray.config.models import Widths


class KDConfig(FrozenModel):
    """Plain distillation: h(z, y) + w h(z, p_F) on one head."""

    w: float = Field(1.0, ge=0, description="Weight of the distillation term.")


class AHConfig(FrozenModel):
    """The auxiliary head: h(z_S, y) + w h(z_D, min(1, alpha p_F)), beta on its gradient."""

    w: float = Field(1.0, ge=0, description="Weight of the auxiliary head's term.")
    alpha: float = Field(
        1.0, gt=0, description="Factor on the teacher's prediction, which is then capped at 1."
    )
    beta: float = Field(
        4.0, ge=0, description="Factor on the auxiliary head's gradient into the backbone."
    )
    mlp: Widths | tuple[()] = Field(
        (), description="Hidden widths of the auxiliary head; empty: a linear head."
    )


class SAConfig(FrozenModel):
    """The student adapter: a small MLP over the teacher's prediction that learns the label.

    It has an optimizer of its own.
    """

    old_names: ClassVar[Mapping[str, str]] = {"own_head": "separate_head"}

    w: float = Field(
        1.0,
        ge=0,
        description="Weight of the adapter's term. `beta` applies to it, `alpha` does not.",
    )
    mlp: Widths | tuple[()] = Field(
        (16,), description="Hidden widths of the adapter; empty: a linear adapter."
    )
    lr: float = Field(1e-3, gt=0, description="Learning rate of the adapter.")
    input: Literal["probability", "logit"] = Field(
        "logit", description="Form in which the adapter reads the teacher's prediction."
    )
    separate_head: bool = Field(
        True,
        description="Let a third head learn the adapter's output; otherwise the auxiliary head "
        "does.",
    )


class ShareConfig(FrozenModel):
    """Arms with +share: rows of the teacher's tables are copied into the vertical model.

    Before each window is evaluated, the vertical model's tables take over the teacher's rows of
    the ids that occur in the window.
    """

    old_names: ClassVar[Mapping[str, str]] = {"unseen_below": "min_uses"}

    tables: tuple[Name, ...] = Field((), description="Names of shared tables; empty: all tables.")
    mode: Literal["replace", "average", "unseen"] = Field(
        "replace",
        description="replace: the teacher's row replaces the model's; average: a weighted mean of "
        "both; unseen: replace only rows that few of the model's examples have used.",
    )
    weight: float = Field(
        0.5, gt=0, le=1, description="Weight of the teacher's row in the mean (mode: average)."
    )
    min_uses: int = Field(
        3,
        ge=1,
        description="A row that the model's examples so far have used at least this often is not "
        "replaced (mode: unseen).",
    )
    optimizer: Literal["keep", "reset", "teacher"] = Field(
        "keep",
        description="Adagrad state of a copied row. keep: the model's; reset: zero; teacher: the "
        "teacher's.",
    )
    projection: Literal["none", "principal"] = Field(
        "none",
        description="How teacher rows of another width are mapped. none: they are refused; "
        "principal: onto the principal directions of the first rows.",
    )
    table_lr: float = Field(
        0.005,
        gt=0,
        description="Learning rate of the tables of such arms, instead of vm.optimizer.table_lr. "
        "It is lower because copied rows are already trained.",
    )


class HistoryConfig(FrozenModel):
    """Arms with +history: dense inputs from the same user's examples in earlier windows.

    They are made from the FM's representations of these examples.
    """

    old_names: ClassVar[Mapping[str, str]] = {"last": "last_k", "drift": "embedding_space"}

    layer: str = Field(
        "backbone",
        description="Module of the FM's network whose output is the representation of an example.",
    )
    key: Name | None = Field(
        None,
        description="Single-valued feature that identifies the user; null: the schema's group_by.",
    )
    dim: int = Field(
        16,
        ge=1,
        description="int8 numbers stored per example, made by a fixed random projection.",
    )
    last_k: int = Field(
        0,
        ge=0,
        description="Number of last examples that become inputs, newest first; 0: the mean of all "
        "examples.",
    )
    embedding_space: Literal["pinned", "refreshed", "aligned"] = Field(
        "pinned",
        description="Snapshot that makes the representations. pinned: the first one for all "
        "windows; refreshed: for each window the one that supervises it; aligned: as refreshed, "
        "and stored representations are mapped into its space.",
    )


class DistillationConfig(FrozenModel):
    """How the arms use the teacher."""

    kd: KDConfig = Field(KDConfig(), description="Plain distillation.")
    ah: AHConfig = Field(AHConfig(), description="The auxiliary head.")
    sa: SAConfig = Field(SAConfig(), description="The student adapter.")
    share: ShareConfig = Field(ShareConfig(), description="Shared rows of the teacher's tables.")
    history: HistoryConfig = Field(HistoryConfig(), description="The teacher's view of the user.")
