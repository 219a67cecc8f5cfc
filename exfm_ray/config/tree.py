"""A config as a tree of plain values."""

from __future__ import annotations

from typing import Any


def set_dotted(
    tree: dict[str, Any],
    key: str,
    value: object,
) -> None:
    """Set a dotted key of a tree; ValueError where a part of it is no section."""
    *path, last = key.split(".")
    for part in path:
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            raise ValueError(f"'{part}' is a value, not a section")
        tree = below
    tree[last] = value
