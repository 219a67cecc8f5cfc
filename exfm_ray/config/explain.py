"""Validation errors in words that a user can act on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter

from exfm_ray.config.models import MODEL_TYPES, custom_config_class, registered_types
from exfm_ray.errors import nearest
from exfm_ray.storage.remote import redact_url

JSONSchema = Mapping[str, Any]


def explain(error: Any, root: type[BaseModel]) -> str:
    """Describe one validation error: the setting, its value and the nearest known name.

    Args:
        error: an item of pydantic's `ValidationError.errors()`.
        root: the model that was validated.
    """
    path = error["loc"]
    setting = ".".join(str(part) for part in path)
    if error["type"] == "extra_forbidden":
        return f"unknown setting '{setting}'.{_known_names(root, path)}"
    types = [*MODEL_TYPES, *registered_types()]
    if error["type"] == "union_tag_not_found":
        return f"setting '{setting}': give it a 'type': {', '.join(types)}"

    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_invalid":
        message += _other_types(error["ctx"]["tag"], types)
    value = _quoted(error["input"])
    return f"setting '{setting}': {message}{value}"


def _known_names(root: type[BaseModel], path: Sequence[str | int]) -> str:
    """Return the known name nearest to an unknown one, or all known names."""
    known = _known_keys(root, path[:-1])
    unknown = str(path[-1])
    return nearest(unknown, known) or f" Known here: {', '.join(known)}."


def _other_types(unknown: str, types: Sequence[str]) -> str:
    """Return the types of models that are not built in, and the known type nearest to `unknown`."""
    registered = [f", '{name}'" for name in types if name not in MODEL_TYPES]
    listed = "".join(registered) + ", or my_module:MyModel for a model of your own."
    return listed + nearest(unknown, types)


def _quoted(value: object) -> str:
    """Return the value in parentheses; nothing for a section or list, which is too long to show."""
    if isinstance(value, dict | list | tuple | BaseModel):
        return ""
    shown = redact_url(value) if isinstance(value, str) else value
    return f" (given: {shown!r})"


def _known_keys(root: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the names allowed below a path of the tree."""
    schema = TypeAdapter(root).json_schema()
    node: JSONSchema = schema
    for i, part in enumerate(path):
        node = _resolve(schema, node)
        if isinstance(part, str) and part not in node.get("properties", {}):
            custom = custom_config_class(part)
            if custom is not None:
                return _known_keys(custom, path[i + 1 :])
        node = _step(schema, node, part)
    properties = _resolve(schema, node).get("properties", {})
    return list(properties)


def _step(
    schema: JSONSchema,
    node: JSONSchema,
    part: str | int,
) -> JSONSchema:
    """Return the JSON schema of one part of a path below `node`."""
    if isinstance(part, int):
        items: JSONSchema = node.get("items", {})
        return items
    if part in node.get("properties", {}):
        property_schema: JSONSchema = node["properties"][part]
        return property_schema

    # A tagged union: pydantic puts the tag into the path.
    for option in _options(schema, node):
        if option.get("properties", {}).get("type", {}).get("const") == part:
            return option
    return {}


def _options(schema: JSONSchema, node: JSONSchema) -> list[JSONSchema]:
    """Return the alternatives of a union, and those of unions inside it."""
    options: list[JSONSchema] = []
    for keyword in ("anyOf", "oneOf"):
        for option in node.get(keyword, []):
            resolved = _resolve(schema, option)
            options.append(resolved)
            options += [_resolve(schema, nested) for nested in resolved.get("oneOf", [])]
    return options


def _resolve(schema: JSONSchema, node: JSONSchema) -> JSONSchema:
    """Follow references, and choose the section of one that may be left out."""
    while True:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        elif {"type": "null"} in node.get("anyOf", []):
            node = node["anyOf"][0]
        else:
            return node
