"""Validation errors in words that a user can act on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter

from exfm_ray.config.models import MODEL_TYPES
from exfm_ray.errors import nearest
from exfm_ray.storage.remote import redact_url


def explain(error: Any, root: type[BaseModel]) -> str:
    """One validation error in a user's words: the setting, its value, the nearest known name."""
    place = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(root, error["loc"][:-1])
        return f"unknown setting '{place}'." + (
            nearest(str(error["loc"][-1]), known) or f" Known here: {', '.join(known)}."
        )
    if error["type"] == "union_tag_not_found":
        return f"setting '{place}': give it a 'type': {', '.join(MODEL_TYPES)}"
    message = error["msg"].removeprefix("Value error, ")
    told = redact_url(error["input"]) if isinstance(error["input"], str) else error["input"]
    given = (
        f" (given: {told!r})"
        if not isinstance(error["input"], dict | list | tuple | BaseModel)
        else ""
    )
    return f"setting '{place}': {message}{given}"


def _known_keys(root: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Names allowed below a path of the tree."""
    schema = TypeAdapter(root).json_schema()
    node: dict[str, Any] = schema

    def resolve(n: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in n or {"type": "null"} in n.get("anyOf", []):
            n = (
                schema["$defs"][n["$ref"].rpartition("/")[2]] if "$ref" in n else n["anyOf"][0]
            )  # a section that may be left out
        return n

    for part in path:
        node = resolve(node)
        options = [resolve(o) for o in node.get("anyOf", []) + node.get("oneOf", [])]
        if isinstance(part, int):
            node = node.get("items", {})
        elif part in node.get("properties", {}):
            node = node["properties"][part]
        else:  # a tagged union: pydantic puts the tag into the path
            options += [resolve(o) for option in options for o in option.get("oneOf", [])]
            node = next(
                (
                    o
                    for o in options
                    if o.get("properties", {}).get("type", {}).get("const") == part
                ),
                {},
            )
    return list(resolve(node).get("properties", {}))
