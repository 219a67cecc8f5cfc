"""What a run's supervision lacks, in words: of its summary, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def lacking(summary: Mapping[str, Any]) -> list[str]:
    """A line for each fragment or window that is parked, and for each window that another snapshot scored than the one asked for."""
    lines = []
    for row in summary.get("parked", ()):
        what = f"window {row['window']}" + (f", {row['fragment']}" if row["fragment"] else "")
        lines.append(f"{what}: no supervision by '{row['teacher']}', parked: {row['cause']}")
    for row in summary.get("stood_in", ()):
        lines.append(f"window {row['window']}: supervised by snapshot {row['snapshot']} of '{row['teacher']}', snapshot {row['asked']} is left out")
    return lines
