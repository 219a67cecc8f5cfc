"""What the arms do with the teacher: one section for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from exfm_ray.base import FrozenModel, Name
from exfm_ray.config.models import Widths


class KDConfig(FrozenModel):
    """Plain distillation: h(z, y) + w h(z, p_F) on one head."""

    w: float = Field(1.0, ge=0)


class AHConfig(FrozenModel):
    """The auxiliary head: h(z_S, y) + w h(z_D, min(1, alpha p_F)), its gradient into the backbone
    times beta."""

    w: float = Field(1.0, ge=0)
    alpha: float = Field(1.0, gt=0)
    beta: float = Field(4.0, ge=0)
    mlp: Widths | tuple[()] = ()


class SAConfig(FrozenModel):
    """The student adapter: a tiny MLP from the teacher's prediction, learnt on the label by an
    optimizer of its own."""

    old_names: ClassVar[Mapping[str, str]] = {"own_head": "separate_head"}

    w: float = Field(
        1.0, ge=0, description="weight of the adapter's term; alpha does not apply to it, beta does"
    )
    mlp: Widths | tuple[()] = (16,)
    lr: float = Field(1e-3, gt=0)
    input: Literal["probability", "logit"] = "logit"
    separate_head: bool = Field(
        True,
        description="a third head learns the adapter's target; otherwise the auxiliary head does",
    )


class ShareConfig(FrozenModel):
    """Arms with +share: before each window is evaluated, the VM's tables are given the FM's rows of
    the ids that occur in it."""

    old_names: ClassVar[Mapping[str, str]] = {"unseen_below": "min_uses"}

    tables: tuple[Name, ...] = Field((), description="names of tables; none: all")
    mode: Literal["replace", "average", "unseen"] = Field(
        "replace", description="unseen: only rows that few of the VM's examples have used"
    )
    weight: float = Field(0.5, gt=0, le=1, description="share of the FM's row (mode: average)")
    min_uses: int = Field(
        3,
        ge=1,
        description="uses, in the VM's examples so far, from which on a row is its own (mode: unseen)",
    )
    optimizer: Literal["keep", "reset", "teacher"] = Field(
        "keep", description="Adagrad state of a given row: the VM's, zero, or the FM's"
    )
    projection: Literal["none", "principal"] = Field(
        "none", description="how rows of another width become the VM's"
    )
    table_lr: float = Field(
        0.005,
        gt=0,
        description="rate of such an arm's tables in place of vm.optimizer.table_lr: given rows are learnt already",
    )


class HistoryConfig(FrozenModel):
    """Arms with +history: further dense inputs, made of the FM's representations of the same user's
    examples in earlier windows."""

    old_names: ClassVar[Mapping[str, str]] = {"last": "last_k", "drift": "embedding_space"}

    layer: str = Field(
        "backbone", description="module of the FM's network whose output represents an example"
    )
    key: Name | None = Field(
        None,
        description="single-valued feature whose examples belong together; none: the schema's group_by",
    )
    dim: int = Field(
        16, ge=1, description="int8 numbers kept of an example, by a fixed random projection"
    )
    last_k: int = Field(
        0, ge=0, description="so many last examples in order, newest first; 0: the mean of all"
    )
    embedding_space: Literal["pinned", "refreshed", "aligned"] = Field(
        "pinned",
        description="all by the first snapshot; each by the one that supervises it; so, and what is stored mapped into its space",
    )


class DistillationConfig(FrozenModel):
    """Settings of the arms."""

    kd: KDConfig = KDConfig()
    ah: AHConfig = AHConfig()
    sa: SAConfig = SAConfig()
    share: ShareConfig = ShareConfig()
    history: HistoryConfig = HistoryConfig()
