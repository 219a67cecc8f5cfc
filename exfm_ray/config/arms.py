"""Arms: how a vertical model learns.

An arm is an objective followed by options, such as `ah`, `ah+share` or `labels+share+history`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from exfm_ray.errors import nearest


class Objective(StrEnum):
    """What an arm minimizes.

    labels: the loss on labels only; kd: plain distillation; ah: auxiliary head; ah_sa: auxiliary
    head with student adapter.
    """

    LABELS = "labels"
    KD = "kd"
    AH = "ah"
    AH_SA = "ah_sa"


class Option(StrEnum):
    """What an arm uses of the teacher in addition to its predictions.

    share: rows of the teacher's tables; history: the teacher's representations of the user's
    earlier examples.
    """

    SHARE = "share"
    HISTORY = "history"


class Arm(str):
    """An objective with options, as a string with the options in a fixed order.

    The string is the name of the arm in files and charts.

    Attributes:
        objective: what the arm minimizes.
        options: empty for a plain objective.
    """

    __slots__ = ("objective", "options")
    objective: Objective
    options: frozenset[Option]

    def __new__(cls, text: str) -> Self:
        """Parse an arm.

        Raises:
            ValueError: an unknown objective or option, or an option that is named twice.
        """
        objective, *options = text.split("+")
        known_objectives = list(Objective)
        known_options = list(Option)
        _check_known(text, "objective", objective, known_objectives)
        for option in options:
            _check_known(text, "option", option, known_options)
            if options.count(option) > 1:
                raise ValueError(f"'{text}' names option '{option}' twice")

        ordered = [option for option in known_options if option in options]
        name = "+".join([objective, *ordered])
        arm = super().__new__(cls, name)
        arm.objective = Objective(objective)
        arm.options = frozenset(ordered)
        return arm

    def __getnewargs__(self) -> tuple[str]:
        return (str(self),)

    def __str__(self) -> str:
        return str.__str__(self)

    @property
    def uses_supervision(self) -> bool:
        """True if the arm learns from the teacher's predictions."""
        return self.objective is not Objective.LABELS

    @property
    def shares_tables(self) -> bool:
        """True if the arm takes over rows of the teacher's tables."""
        return Option.SHARE in self.options

    @property
    def uses_history(self) -> bool:
        """True if the arm reads the teacher's representations of the user's earlier examples.

        At serving time they come from a feature store.
        """
        return Option.HISTORY in self.options

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        to_plain_string = core_schema.plain_serializer_function_ser_schema(lambda arm: "".join(arm))
        return core_schema.no_info_after_validator_function(
            cls, core_schema.str_schema(), serialization=to_plain_string
        )


def _check_known(
    text: str,
    kind: str,
    word: str,
    known: Sequence[str],
) -> None:
    if word in known:
        return
    raise ValueError(
        f"'{text}': unknown {kind} '{word}'; an arm is one of {', '.join(Objective)}, "
        f"with options as in labels+share.{nearest(word, known)}"
    )


LABELS = Arm("labels")
"""The baseline of all gains."""

ALL_OBJECTIVES = tuple(Arm(objective) for objective in Objective)
"""The objectives without options."""
