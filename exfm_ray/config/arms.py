"""An arm: how a vertical model learns. It is written `ah`, `ah+share`, `labels+share+history`: an
objective, then options."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from exfm_ray.errors import nearest


class Objective(StrEnum):
    """What is minimised: labels only, plain distillation, auxiliary head, auxiliary head with
    student adapter."""

    LABELS = "labels"
    KD = "kd"
    AH = "ah"
    AH_SA = "ah_sa"


class Option(StrEnum):
    """What a vertical model is given of the FM beside its predictions: rows of its tables, its
    representations of a user's past."""

    SHARE = "share"
    HISTORY = "history"


class Arm(str):
    """An objective with options, which is its own name in files and figures: a string, options in
    one order.

    Attributes:
        objective: what it minimises.
        options: none, for the plain objective.
    """

    __slots__ = ("objective", "options")
    objective: Objective
    options: frozenset[Option]

    def __new__(cls, text: str) -> Self:
        """ValueError for an unknown objective or option, or one named twice."""
        objective, *options = text.split("+")
        _check(text, "objective", objective, list(Objective))
        for option in options:
            _check(text, "option", option, list(Option))
            if options.count(option) > 1:
                raise ValueError(f"'{text}' names option '{option}' twice")
        arm = super().__new__(
            cls, "+".join([objective, *(option for option in Option if option in options)])
        )
        arm.objective = Objective(objective)
        arm.options = frozenset(Option(option) for option in options)
        return arm

    def __getnewargs__(self) -> tuple[str]:
        return (str(self),)

    def __str__(self) -> str:
        return str.__str__(self)

    @property
    def uses_supervision(self) -> bool:
        """True when it learns the teacher's predictions."""
        return self.objective is not Objective.LABELS

    @property
    def shares_tables(self) -> bool:
        """True when it is given rows of the teacher's tables."""
        return Option.SHARE in self.options

    @property
    def uses_history(self) -> bool:
        """True when it reads the teacher's representations of the user's earlier examples: at
        serving, from a feature store."""
        return Option.HISTORY in self.options

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls,
            core_schema.str_schema(),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda arm: "".join(arm)
            ),
        )


def _check(
    text: str,
    kind: str,
    part: str,
    known: Sequence[str],
) -> None:
    if part not in known:
        hint = nearest(part, known)
        raise ValueError(
            f"'{text}': unknown {kind} '{part}'; an arm is one of {', '.join(Objective)}, with options as in labels+share.{hint}"
        )


LABELS = Arm("labels")
"""The baseline of all gains."""

ALL_OBJECTIVES = tuple(Arm(objective) for objective in Objective)
"""The objectives without options."""
