"""Which windows of a run have no supervision, or that of a fallback snapshot, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMER_KEYS = {"failed_items": "parked", "fallback_windows": "stood_in"}
"""Key of summary.json -> its name in summaries of earlier versions."""


def missing_supervision(summary: Mapping[str, Any]) -> list[str]:
    """Describe what summary.json lists as failed or as labeled by a fallback snapshot.

    Returns:
        A line for each failed window or fragment, then one for each window that an older snapshot
        has scored than the requested one.
    """
    failed = [_failed_line(row) for row in _rows(summary, "failed_items")]
    fallback = [_fallback_line(row) for row in _rows(summary, "fallback_windows")]
    return failed + fallback


def _rows(summary: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    rows = summary.get(key, summary.get(FORMER_KEYS[key]))
    return list(rows or ())


def _failed_line(row: Mapping[str, Any]) -> str:
    teacher = row["teacher"]
    cause = row["cause"]
    fragment = row["fragment"]
    place = f"window {row['window']}"
    if fragment:
        place += f", {fragment}"
    return f"{place}: no supervision by '{teacher}', failed: {cause}"


def _fallback_line(row: Mapping[str, Any]) -> str:
    window = row["window"]
    teacher = row["teacher"]
    snapshot = row["snapshot"]
    requested = row["asked"]
    return (
        f"window {window}: supervised by fallback snapshot {snapshot} of '{teacher}' "
        f"instead of snapshot {requested}"
    )
