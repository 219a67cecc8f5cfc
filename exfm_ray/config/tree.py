"""A config as a tree of plain values."""

from __future__ import annotations

from typing import Any


def set_dotted(
    tree: dict[str, Any],
    key: str,
    value: object,
) -> None:
    """Set a dotted key of a tree in place and create missing sections.

    Raises:
        ValueError: a part of the key before the last is a value, not a section.
    """
    *path, last = key.split(".")
    section = tree
    for part in path:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ValueError(f"'{part}' is a value, not a section")
    section[last] = value
