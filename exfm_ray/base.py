"""What every declared structure is made of: an immutable model, names, relative patterns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")]


def _check_relative(pattern: str) -> str:
    path = PurePosixPath(pattern)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"'{pattern}' does not lie below data.root; set data.root to a folder that holds it, "
            "and write the path from there"
        )
    return pattern


RelativePattern = Annotated[str, AfterValidator(_check_relative)]
"""A file name or pattern below some folder, which it cannot lead out of."""


class FrozenModel(BaseModel):
    """Base of every declared structure: immutable, and unknown keys are refused.

    Attributes:
        old_names: former name -> name of a field. Files written before a rename stay readable.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    old_names: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values

        renamed = dict(values)
        for old, new in cls.old_names.items():
            if old not in renamed:
                continue
            if new in renamed:
                raise ValueError(f"'{old}' is the former name of '{new}': set '{new}' alone")
            renamed[new] = renamed.pop(old)
        return renamed
