"""Tables of runs for a terminal: those of a folder, and two beside each other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from exfm_ray.errors import UserError
from exfm_ray.schema import ALL_DOMAINS
from exfm_ray.tracking.run_files import KEY, Row, RunFiles

NOT_COMPARED = ("name", "run.dir")


def runs_table(folder: Path) -> Table:
    """A line for each run of a folder, the newest last; UserError where there is none."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; runs go to the folder that the setting run.dir names"
        )
    found = sorted((path.parent for path in folder.glob("*/config.yaml")), key=_changed)
    if not found:
        raise UserError(
            f"{folder}: no runs here; `run.py runs DIR` lists the folders below DIR that hold a config.yaml"
        )
    table = Table(title=f"{len(found)} run(s) in {folder}")
    for heading in ("run", "state", "changed", "done", "FM's NE", "best arm: NE gain %"):
        table.add_column(heading, overflow="fold")
    for path in found:
        table.add_row(*_line(path))
    return table


def _changed(folder: Path) -> float:
    """When the run last wrote a figure, else when it was begun."""
    metrics = folder / "metrics.jsonl"
    return (metrics if metrics.exists() else folder / "config.yaml").stat().st_mtime


def _line(folder: Path) -> tuple[str, ...]:
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(_changed(folder)))
    try:
        run = RunFiles.open(folder)
        return folder.name, run.state, changed, _progress(run), _fm(run), "\n".join(_best(run))
    except UserError as error:  # one damaged run does not hide the others
        return folder.name, "damaged", changed, str(error), "", ""


def _progress(run: RunFiles) -> str:
    """Windows, or passes over a static set, of each model."""
    if run.static:
        return f"{max(run.done.values())} passes"
    if len(set(run.done.values())) == 1:
        return f"{max(run.done.values())} of {run.windows} windows"
    return "\n".join(f"{name} {done} of {run.windows}" for name, done in run.done.items())


def _fm(run: RunFiles) -> str:
    """The FM's NE over all domains, by task."""
    rows = [row for row in run.figures if row["role"] == "fm" and row["domain"] == ALL_DOMAINS]
    if run.static:
        rows = [row for row in rows if row["window"] == min(r["window"] for r in rows)]
    return "\n".join(f"{row['task']} {row['ne']:.4f}" for row in rows if row["ne"] is not None)


def _best(run: RunFiles) -> list[str]:
    """The arm of the greatest NE gain of each vertical model and task."""
    best: dict[tuple[str, str], Row] = {}
    for row in run.figures:
        place = (row["model"], row["task"])
        if row.get("ne_gain") is not None and (
            place not in best or row["ne_gain"] > best[place]["ne_gain"]
        ):
            best[place] = row
    tasks = {task for _, task in best}
    return [
        f"{m}{f' {t}' if len(tasks) > 1 else ''}: {row['arm']} {100 * row['ne_gain']:+.2f}"
        for (m, t), row in best.items()
    ]


def figures_table(run: RunFiles) -> Table:
    """A run's figures over the windows after its warm-up that are done."""
    table = Table(title=f"{run.name}: {run.state}")
    for heading in ("domain", "task", "model", "arm"):
        table.add_column(heading)
    for heading in ("NE", "AUC", "calibr.", "NE gain %", "TR", "examples"):
        table.add_column(heading, justify="right")
    for row in _wanted(run.figures):
        cells = [
            _cell(row.get(figure), form)
            for figure, form in (("ne", ".4f"), ("auc", ".4f"), ("calibration", ".4f"))
        ]
        cells += [
            _percent(row.get("ne_gain")),
            _cell(row.get("transfer_ratio"), ".2f"),
            _cell(row["examples"], ",d"),
        ]
        table.add_row(row["domain"], row["task"], row["model"], row["arm"], *cells)
    return table


def _wanted(rows: Sequence[Row]) -> list[Row]:
    """The rows over all domains, and of each domain and task those of its vertical models and of
    the FM."""
    places = {(row["domain"], row["task"]) for row in rows if row["role"] == "vm"}
    wanted = [
        row
        for row in rows
        if row["domain"] == ALL_DOMAINS or (row["domain"], row["task"]) in places
    ]
    return sorted(
        wanted, key=lambda row: (row["domain"] != ALL_DOMAINS, row["domain"], row["task"])
    )


def compare_tables(first: RunFiles, second: RunFiles) -> list[Table]:
    """The figures of two runs with their differences, and the settings in which they differ."""
    names = [str(run.folder) for run in (first, second)]
    if names[0] == names[1]:
        raise UserError(f"{names[0]}: compare needs two runs, this is one given twice")
    figures = Table(
        title=f"A = {names[0]}, B = {names[1]}: over the windows after each run's warm-up"
    )
    for heading in ("model", "arm", "domain", "task"):
        figures.add_column(heading, overflow="fold")
    for heading in (
        "NE A",
        "NE B",
        "B - A, %",
        "gain % A",
        "gain % B",
        "TR A",
        "TR B",
        "cal. A",
        "cal. B",
    ):
        figures.add_column(heading, justify="right")
    a, b = ({_identity(row): row for row in run.figures} for run in (first, second))
    for row in _wanted(list((b | a).values())):
        key = _identity(row)
        figures.add_row(
            row["model"],
            row["arm"],
            row["domain"],
            row["task"],
            *_differences(a.get(key, {}), b.get(key, {})),
        )
    return [figures, settings_table(first, second)]


def _identity(row: Row) -> tuple[Any, ...]:
    return (
        *(row[key] for key in KEY),
        row.get("window"),
    )  # that of a static set; None over windows


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    nes = [a.get("ne"), b.get("ne")]
    change = f"{100 * (nes[1] - nes[0]) / nes[0]:+.2f}" if nes[0] and nes[1] is not None else ""
    cells = [_cell(ne, ".4f") for ne in nes] + [change]
    cells += [_percent(row.get("ne_gain")) for row in (a, b)]
    return cells + [
        _cell(row.get(figure), form)
        for figure, form in (("transfer_ratio", ".2f"), ("calibration", ".3f"))
        for row in (a, b)
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.2f}"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def settings_table(first: RunFiles, second: RunFiles) -> Table:
    """The settings in which two runs differ; one that a run's version did not have is a dash."""
    a = flat(first.config)
    b = flat(second.config)
    table = Table(title="settings that differ")
    for heading in ("setting", "A", "B"):
        table.add_column(heading, overflow="fold")
    for name in dict.fromkeys((*a, *b)):
        if a.get(name, "-") != b.get(name, "-") and name not in NOT_COMPARED:
            table.add_row(name, a.get(name, "-"), b.get(name, "-"))
    return table


def flat(tree: Any, place: str = "") -> dict[str, str]:
    """Dotted setting -> value as text."""
    if isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        tree = {str(i): value for i, value in enumerate(tree)}
    if not isinstance(tree, dict) or not tree:
        return {place: str(tree)}
    settings: dict[str, str] = {}
    for name, value in tree.items():
        settings |= flat(value, f"{place}.{name}" if place else str(name))
    return settings
