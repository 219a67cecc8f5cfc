"""Manifests: JSON files, written last, that make the files beside them visible."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import read_json
from exfm_ray.storage.remote import AnyPath

M = TypeVar("M", bound=BaseModel)


def read_manifest(path: AnyPath, kind: type[M], what: str, way_out: str = "") -> M:
    """Read a manifest and check its fields.

    Args:
        path: the JSON file.
        kind: the model that it must satisfy.
        what: what the file should be, as in "a window manifest".
        way_out: what the user can do about a damaged one.

    Raises:
        UserError: the file is missing, is not JSON, or does not satisfy `kind`.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        ending = f"; {way_out}" if way_out else ""
        raise UserError(f"{path}: not {what} ({reason}){ending}") from None
