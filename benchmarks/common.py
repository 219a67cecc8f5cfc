"""Shared by benchmarks and studies: the arguments, and the JSON object that is the last line."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil


def arguments(
    module: str,
    description: str,
    paths: Mapping[str, str] = {},
) -> argparse.Namespace:
    """Parse `[--data DIR] [--quick]` and further options that are paths; print the description.

    Args:
        module: module that is run, as in `python -m benchmarks.das`.
        description: what the command will do and how long it takes.
        paths: further option -> its help.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    default_data = Path(os.environ.get("EXFM_DATA", "../shared/data"))
    parser.add_argument(
        "--data", type=Path, default=default_data, help="folder of the raw data sets"
    )
    parser.add_argument("--quick", action="store_true", help="smaller, less exact")
    for option, explanation in paths.items():
        parser.add_argument(option, type=Path, help=explanation)
    options = parser.parse_args()
    print(description, flush=True)
    return options


def machine() -> str:
    """Describe the processor, its cores and the memory."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if "model name" in line:
            model = line.split(":")[1].strip()
            break
    memory = psutil.virtual_memory().total / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB"


def bar(
    value: float | None,
    limit: float,
    at_least: bool = True,
) -> dict[str, Any]:
    """Compare a value with its bar.

    Args:
        value: None where it could not be measured; then the bar does not hold.
        limit: the bar.
        at_least: whether the value must reach the bar; otherwise it must not exceed it.
    """
    holds = False
    if value is not None:
        holds = value >= limit if at_least else value <= limit
    return {"value": value, "bar": limit, "holds": holds}


def report(
    name: str,
    figures: dict[str, Any],
    bars: dict[str, dict[str, Any]],
) -> None:
    """Print the bars for people and one JSON object for programs."""
    for title, entry in bars.items():
        verdict = "holds" if entry["holds"] else "DOES NOT HOLD"
        print(f"{title}: {entry['value']} (bar {entry['bar']}) {verdict}")
    result = {"benchmark": name, "machine": machine(), "figures": figures, "bars": bars}
    print(json.dumps(result))
