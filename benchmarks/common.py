"""What all benchmarks share: the arguments, and the JSON object that is their last line."""

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
    name: str,
    says: str,
    paths: Mapping[str, str] = {},
) -> argparse.Namespace:
    """Parse `[--data DIR] [--quick]`, and options of one's own that are paths (option -> help), and
    say what will be done."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=says)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("EXFM_DATA", "../shared/data")),
        help="folder of the raw data sets",
    )
    parser.add_argument("--quick", action="store_true", help="smaller, less exact")
    for option, explained in paths.items():
        parser.add_argument(option, type=Path, help=explained)
    options = parser.parse_args()
    print(says, flush=True)
    return options


def machine() -> str:
    """Processor, cores and memory."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return f"{model}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def bar(
    value: float | None,
    limit: float,
    at_least: bool = True,
) -> dict[str, Any]:
    """One bar: its value, and whether it holds."""
    return {
        "value": value,
        "bar": limit,
        "holds": value is not None and (value >= limit if at_least else value <= limit),
    }


def report(
    name: str,
    figures: dict[str, Any],
    bars: dict[str, dict[str, Any]],
) -> None:
    """Print the bars for people and the object for programs."""
    for title, b in bars.items():
        print(
            f"{title}: {b['value']} (bar {b['bar']}) {'holds' if b['holds'] else 'DOES NOT HOLD'}"
        )
    print(json.dumps({"benchmark": name, "machine": machine(), "figures": figures, "bars": bars}))
