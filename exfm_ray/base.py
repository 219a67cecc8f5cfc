"""What every declared structure is made of: an immutable model, names, relative patterns."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")]


def _relative(pattern: str) -> str:
    path = PurePosixPath(pattern)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"'{pattern}' does not lie below data.root; set data.root to a folder that holds it, and name it from there")
    return pattern


RelativePattern = Annotated[str, AfterValidator(_relative)]
"""A file's name, or a pattern, below a folder that someone else names: it cannot lead out of it."""


class FrozenModel(BaseModel):
    """Base of every declared structure: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
