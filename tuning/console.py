"""The summary of a sweep as a table on the console."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the summary that `tuning.analysis.analyze` returned, as a table."""
    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 120))
    console = Console(width=width)
    console.print(_table(summary))

    states = ", ".join(f"{count} {state}" for state, count in summary["trials"].items())
    console.print(
        f"Trials: {states}. * chosen on the validation windows. Everything is in {folder}",
        highlight=False,
        soft_wrap=True,
    )


def _table(summary: Mapping[str, Any]) -> Table:
    first, last = summary["judge_windows"]
    title = (
        f"{summary['name']}: windows {first} to {last}, mean of {len(summary['seeds'])} seeds; "
        "gain over tuned labels"
    )
    table = Table(title=title)
    for heading in ("student", "arm", ""):
        table.add_column(heading)
    for heading in ("NE", "calibr.", "NE gain %", "95 % interval", "TR"):
        table.add_column(heading, justify="right")

    for name, student in summary["students"].items():
        for cells in _rows(name, student):
            table.add_row(*cells)
    return table


def _rows(name: str, student: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of a student's rows: the FM, then each arm untuned and tuned."""
    if student["fm_ne"] is not None:
        yield [name, "fm", "", f"{student['fm_ne']:.4f}", "", "", "", ""]
    for arm, figures in student["arms"].items():
        star = " *" if arm == student["best_arm"] else ""
        yield [name, arm, "untuned", *_cells(figures["untuned"])]
        yield [name, arm, "tuned" + star, *_cells(figures["tuned"])]


def _cells(figures: Mapping[str, Any]) -> list[str]:
    gain = figures["ne_gain"]
    interval = ""
    if gain and gain["low"] is not None:
        interval = f"{gain['low'] * 100:.2f} to {gain['high'] * 100:.2f}"
    return [
        _mean(figures["ne"], ".4f"),
        _mean(figures["calibration"], ".3f"),
        _mean(gain, ".2f", 100),
        interval,
        _mean(figures["transfer_ratio"], ".2f"),
    ]


def _mean(
    estimate: Mapping[str, Any] | None,
    form: str,
    scale: float = 1.0,
) -> str:
    return format(estimate["mean"] * scale, form) if estimate else ""
