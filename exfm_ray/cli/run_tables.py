"""Tables of runs for a terminal: one run, the runs of a folder, and two runs side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from exfm_ray.config.root import Config
from exfm_ray.errors import UserError
from exfm_ray.schema import ALL_DOMAINS
from exfm_ray.tracking.run_files import KEY, Row, RunFiles

NOT_COMPARED = ("name", "run.dir")
IDENTITY = ("domain", "task", "model", "arm")


@dataclass(frozen=True)
class Metric:
    """A column of numbers.

    Attributes:
        key: the column of a row of metrics.
        heading: the column of the table.
        form: format specification of the number.
        percent: the number is a fraction and shown as percent.
    """

    key: str
    heading: str
    form: str
    percent: bool = False

    def cell(self, row: Mapping[str, Any]) -> str:
        """Format the metric of a row; empty if the row does not have it."""
        value = row.get(self.key)
        if value is None:
            return ""
        if self.percent:
            value = 100 * value
        return format(value, self.form)


NE = Metric("ne", "NE", ".4f")
AUC = Metric("auc", "AUC", ".4f")
GROUPED_AUC = Metric("gauc", "gAUC", ".4f")
CALIBRATION = Metric("calibration", "calibr.", ".4f")
LOG_LOSS = Metric("log_loss", "log loss", ".4f")
BEST_NE = Metric("best_ne", "best NE", ".4f")
NE_GAIN = Metric("ne_gain", "NE gain %", ".2f", percent=True)
TRANSFER_RATIO = Metric("transfer_ratio", "TR", ".2f")

STREAM_METRICS: Sequence[Metric] = (
    NE,
    AUC,
    GROUPED_AUC,
    CALIBRATION,
    BEST_NE,
    NE_GAIN,
    TRANSFER_RATIO,
)
STATIC_METRICS: Sequence[Metric] = (NE, AUC, GROUPED_AUC, CALIBRATION, LOG_LOSS)
FIGURES = (
    NE,
    AUC,
    CALIBRATION,
    Metric("ne_gain", "NE gain %", "+.2f", percent=True),
    TRANSFER_RATIO,
    Metric("examples", "examples", ",d"),
)
COMPARED = (
    Metric("ne_gain", "gain %", "+.2f", percent=True),
    TRANSFER_RATIO,
    Metric("calibration", "cal.", ".3f"),
)


def _table(
    title: str,
    texts: Sequence[str],
    numbers: Sequence[str] = (),
    fold: bool = False,
) -> Table:
    """Create a table with columns of text, then of right-aligned numbers.

    Args:
        title: of the table.
        texts: headings.
        numbers: headings.
        fold: break long texts instead of cutting them off.
    """
    table = Table(title=title)
    for heading in texts:
        table.add_column(heading, overflow="fold" if fold else "ellipsis")
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def summary_table(config: Config, summary: Mapping[str, Any]) -> Table:
    """Create the table of a run's summary.json: all domains, and those of its vertical models."""
    columns = {column: column for column in IDENTITY}
    metrics = STREAM_METRICS
    if config.fm.static:
        columns = {"pass": "best pass", "window": "window"} | columns
        metrics = STATIC_METRICS

    headings = [metric.heading for metric in metrics]
    title = _summary_title(config.name, summary["windows"])
    table = _table(title, list(columns.values()), headings)

    domains = {student.domain for student in config.vm.models} | {ALL_DOMAINS}
    rows = [row for row in summary["figures"] if row["domain"] in domains]
    for row in sorted(rows, key=_domain_then_task):
        identity = [str(row[column]) for column in columns]
        cells = [metric.cell(row) for metric in metrics]
        table.add_row(*identity, *cells)
    return table


def _summary_title(name: str, windows: Sequence[int]) -> str:
    if not windows:
        return name
    first = windows[0]
    last = windows[-1]
    return f"{name}: windows {first} to {last}"


def _domain_then_task(row: Row) -> tuple[bool, str, str]:
    """Sort key: all domains first."""
    domain = row["domain"]
    is_one_domain = domain != ALL_DOMAINS
    return is_one_domain, domain, row["task"]


def runs_table(folder: Path) -> Table:
    """Create a table with a line for each run of a folder, the newest last.

    Raises:
        UserError: there are no runs.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; runs are stored in the folder of the setting run.dir"
        )
    configs = folder.glob("*/config.yaml")
    runs = sorted((path.parent for path in configs), key=_changed_s)
    if not runs:
        raise UserError(
            f"{folder}: no runs here; `run.py runs DIR` lists the folders below DIR that contain a "
            "config.yaml"
        )
    headings = ("run", "state", "changed", "done", "FM's NE", "best arm: NE gain %")
    table = _table(f"{len(runs)} run(s) in {folder}", headings, fold=True)
    for run in runs:
        table.add_row(*_run_line(run))
    return table


def _changed_s(folder: Path) -> float:
    """Return when the run last wrote a metric, else when it began."""
    metrics = folder / "metrics.jsonl"
    file = metrics if metrics.exists() else folder / "config.yaml"
    return file.stat().st_mtime


def _run_line(folder: Path) -> tuple[str, ...]:
    name = folder.name
    changed_at = time.localtime(_changed_s(folder))
    changed = time.strftime("%Y-%m-%d %H:%M", changed_at)
    try:
        run = RunFiles.open(folder)
        state = run.state
        done = _progress(run)
        ne = _fm_ne(run)
        best = "\n".join(_best_arms(run))
    except UserError as error:  # One damaged run does not hide the others.
        return name, "damaged", changed, str(error), "", ""
    return name, state, changed, done, ne, best


def _progress(run: RunFiles) -> str:
    """Describe how many windows, or passes over a static set, each model has done."""
    counts = set(run.done.values())
    if run.static:
        return f"{max(counts)} passes"
    if len(counts) == 1:
        return f"{max(counts)} of {run.windows} windows"

    lines = []
    for name, done in run.done.items():
        lines.append(f"{name} {done} of {run.windows}")
    return "\n".join(lines)


def _fm_ne(run: RunFiles) -> str:
    """Return the FM's NE over all domains, one line per task."""
    rows = [row for row in run.figures if row["role"] == "fm" and row["domain"] == ALL_DOMAINS]
    if run.static:
        validation_window = min(row["window"] for row in rows)
        rows = [row for row in rows if row["window"] == validation_window]

    lines = []
    for row in rows:
        if row["ne"] is not None:
            lines.append(f"{row['task']} {row['ne']:.4f}")
    return "\n".join(lines)


def _best_arms(run: RunFiles) -> list[str]:
    """Describe the arm with the greatest NE gain for each vertical model and task."""
    best: dict[tuple[str, str], Row] = {}
    for row in run.figures:
        if row.get("ne_gain") is None:
            continue
        key = (row["model"], row["task"])
        if key not in best or row["ne_gain"] > best[key]["ne_gain"]:
            best[key] = row

    tasks = {task for _, task in best}
    several_tasks = len(tasks) > 1
    lines = []
    for (model, task), row in best.items():
        name = f"{model} {task}" if several_tasks else model
        lines.append(f"{name}: {row['arm']} {100 * row['ne_gain']:+.2f}")
    return lines


def figures_table(run: RunFiles) -> Table:
    """Create the table of a run's metrics over the windows that are done, without the warm-up."""
    headings = [metric.heading for metric in FIGURES]
    table = _table(f"{run.name}: {run.state}", IDENTITY, headings)
    for row in _main_rows(run.figures):
        identity = [row[column] for column in IDENTITY]
        cells = [metric.cell(row) for metric in FIGURES]
        table.add_row(*identity, *cells)
    return table


def _main_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows over all domains, and those of domains and tasks with vertical models."""
    of_students = {(row["domain"], row["task"]) for row in rows if row["role"] == "vm"}
    main_rows = []
    for row in rows:
        domain = row["domain"]
        if domain == ALL_DOMAINS or (domain, row["task"]) in of_students:
            main_rows.append(row)
    return sorted(main_rows, key=_domain_then_task)


def compare_tables(first: RunFiles, second: RunFiles) -> list[Table]:
    """Create tables of two runs' metrics with their differences, and of settings that differ.

    Raises:
        UserError: both are the same run.
    """
    if str(first.folder) == str(second.folder):
        raise UserError(f"{first.folder}: compare needs two different runs")
    headings = ["NE A", "NE B", "B - A, %"]
    for metric in COMPARED:
        headings += [f"{metric.heading} A", f"{metric.heading} B"]
    table = _table(
        f"A = {first.folder}, B = {second.folder}: over the windows after each run's warm-up",
        ("model", "arm", "domain", "task"),
        headings,
        fold=True,
    )
    a_rows = {_identity(row): row for row in first.figures}
    b_rows = {_identity(row): row for row in second.figures}
    either = b_rows | a_rows
    for row in _main_rows(list(either.values())):
        key = _identity(row)
        cells = _differences(a_rows.get(key, {}), b_rows.get(key, {}))
        table.add_row(row["model"], row["arm"], row["domain"], row["task"], *cells)
    return [table, settings_table(first, second)]


def _identity(row: Row) -> tuple[Any, ...]:
    """Return what identifies a row: its key, and the window of a row of a static set."""
    key = [row[column] for column in KEY]
    window = row.get("window")
    return (*key, window)


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the cells of two rows of metrics, empty where a run has no such row."""
    a_ne = a.get("ne")
    b_ne = b.get("ne")
    change = ""
    if a_ne and b_ne is not None:
        change = f"{100 * (b_ne - a_ne) / a_ne:+.2f}"

    cells = [NE.cell(a), NE.cell(b), change]
    for metric in COMPARED:
        cells += [metric.cell(a), metric.cell(b)]
    return cells


def settings_table(first: RunFiles, second: RunFiles) -> Table:
    """Create the table of settings that differ. A dash is a setting that a run does not have."""
    a_settings = flat(first.config)
    b_settings = flat(second.config)
    table = _table("settings that differ", ("setting", "A", "B"), fold=True)
    for name in dict.fromkeys((*a_settings, *b_settings)):
        a = a_settings.get(name, "-")
        b = b_settings.get(name, "-")
        if a != b and name not in NOT_COMPARED:
            table.add_row(name, a, b)
    return table


def flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Flatten a config: dotted setting -> value as text.

    Args:
        tree: nested mappings; lists of mappings are numbered.
        prefix: setting of the tree itself.
    """
    if isinstance(tree, list):
        holds_mappings = any(isinstance(value, dict) for value in tree)
        if holds_mappings:
            tree = dict(enumerate(tree))
    if not isinstance(tree, dict) or not tree:
        return {prefix: str(tree)}

    settings: dict[str, str] = {}
    for name, value in tree.items():
        setting = f"{prefix}.{name}" if prefix else str(name)
        settings |= flat(value, setting)
    return settings
