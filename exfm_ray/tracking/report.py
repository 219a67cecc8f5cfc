"""report.html: a page about a run, whether it is complete or not. Layout: `report.html.j2`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from exfm_ray.tracking import charts
from exfm_ray.tracking.html_page import Part, place_figure, render_page
from exfm_ray.tracking.missing_supervision import missing_supervision
from exfm_ray.tracking.run_facts import run_facts
from exfm_ray.tracking.run_files import Row, RunFiles, panels
from exfm_ray.tracking.timeline import PAUSE_S, bars, seconds_by_phase

COLUMNS = {
    "model": "model",
    "domain": "domain",
    "task": "task",
    "arm": "arm",
    "pass": "pass",
    "window": "window",
    "ne": "NE",
    "fm_ne": "FM's NE",
    "best_ne": "best NE",
    "ne_gain": "NE gain",
    "fm_ne_gain": "FM's NE gain",
    "transfer_ratio": "transfer ratio",
    "calibration": "calibration",
    "auc": "AUC",
    "gauc": "gAUC",
    "log_loss": "log loss",
    "examples": "examples",
}
"""Figure -> title of its column."""
PERCENT = {"ne_gain", "fm_ne_gain"}
GAIN_HEIGHT = 230
CURVE_HEIGHT = 350
DATA_HEIGHT = 370
"""Heights of plots, in pixels."""


class TableRow(NamedTuple):
    """A row of the table of figures.

    Attributes:
        cells: title of the column -> text.
        is_best: whether this arm has the lowest NE of its model.
    """

    cells: Mapping[str, str]
    is_best: bool


class FiguresTable(NamedTuple):
    """The table of figures over all windows."""

    titles: Sequence[str]
    rows: Sequence[TableRow]
    has_students: bool


class TimelinePlots(NamedTuple):
    """When each role worked, and how long.

    Attributes:
        pauses_s: seconds in which no role worked, which are cut out.
        min_pause_s: seconds from which on a pause is cut out.
    """

    bars: Markup
    totals: Markup
    pauses_s: float
    min_pause_s: float = PAUSE_S


class DataPlots(NamedTuple):
    """How the data change from window to window."""

    plots: Sequence[Markup]
    domains_left_out: int
    has_new_ids: bool


def write_report(folder: Path) -> Path:
    """Write <folder>/report.html from the files of a run.

    Returns:
        Its path.

    Raises:
        UserError: the folder holds no run.
    """
    run = RunFiles.open(folder)
    path = folder / "report.html"
    rows = _table_source(run)
    render_page(
        path,
        "report.html.j2",
        run.name,
        static=run.static,
        missing_supervision=missing_supervision(run.summary or {}),
        facts=run_facts(run),
        table=_table(run, rows),
        gain_plots=_gain_plots(run, rows),
        ne_plots=_curve_plots(run, "ne"),
        calibration_plots=_curve_plots(run, "calibration"),
        timeline=_timeline(run),
        data=_data(run),
    )
    return path


def _table_source(run: RunFiles) -> list[Row]:
    """The rows that are shown: of the FM only those on all domains, if there are students."""
    has_students = any(row["role"] == "vm" for row in run.figures)
    rows = []
    for row in run.figures:
        is_student = row["role"] == "vm"
        on_all_domains = row["domain"] == "all"
        if is_student or on_all_domains or not has_students:
            rows.append(row)
    return sorted(rows, key=lambda row: (row["role"] == "vm", row["model"], row["task"]))


def _table(run: RunFiles, rows: Sequence[Row]) -> FiguresTable:
    columns = {}
    for key, title in COLUMNS.items():
        has_values = any(row.get(key) is not None for row in run.figures)
        only_static = key == "log_loss"
        if has_values and (run.static or not only_static):
            columns[key] = title

    best_arms = _best_arms(rows)
    table_rows = []
    for row in rows:
        cells = {}
        for key, title in columns.items():
            cells[title] = _cell(key, row.get(key))
        best_arm = best_arms.get(_place(row))
        is_best = row["arm"] == best_arm
        table_rows.append(TableRow(cells, is_best))
    return FiguresTable(
        titles=list(columns.values()),
        rows=table_rows,
        has_students=any(row["role"] == "vm" for row in rows),
    )


def _best_arms(rows: Sequence[Row]) -> dict[tuple[str, str, str], str]:
    """(model, domain, task) of a vertical model -> its arm with the lowest NE."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        ne = row["ne"]
        if row["role"] != "vm" or ne is None:
            continue
        place = _place(row)
        so_far = best.get(place)
        if so_far is None or ne <= so_far["ne"]:
            best[place] = row
    return {place: row["arm"] for place, row in best.items()}


def _place(row: Row) -> tuple[str, str, str]:
    return row["model"], row["domain"], row["task"]


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if key in PERCENT:
        return f"{value:+.2%}"
    decimals = 2 if key == "transfer_ratio" else 4
    return f"{value:.{decimals}f}"


def _gain_plots(run: RunFiles, rows: Sequence[Row]) -> list[Markup]:
    """The NE gains of each student and task over its labels arm."""
    pairs: dict[tuple[str, str], None] = {}
    for row in rows:
        if row["role"] == "vm":
            pairs[row["model"], row["task"]] = None
    plots = []
    for model, task in pairs:
        plot = charts.gains(run.figures, model, task)
        if plot["data"]:
            plots.append(plot)
    return _place_all("gain", GAIN_HEIGHT, plots)


def _curve_plots(run: RunFiles, figure: str) -> list[Markup]:
    """A figure (ne or calibration) of all arms, window by window or pass by pass."""
    warmup = run.setting("metrics.warmup_windows", 0)
    plots = []
    for panel in panels(run):
        if panel.curves:
            plot = charts.by_window(panel, figure, warmup)
            plots.append(plot)
    return _place_all(figure, CURVE_HEIGHT, plots)


def _timeline(run: RunFiles) -> TimelinePlots | None:
    """When each role worked; None without a timeline."""
    work, pauses_s = bars(run.spans)
    if not work:
        return None
    totals = seconds_by_phase(work)
    height = 140 + 55 * len(totals)
    return TimelinePlots(
        bars=place_figure(charts.timeline(work), "timeline", height),
        totals=place_figure(charts.time_by_phase(totals, work), "time", height),
        pauses_s=pauses_s,
    )


def _data(run: RunFiles) -> DataPlots | None:
    """Label rates, examples and new ids; None for a static set, which has no order in time."""
    if run.static or not run.rows:
        return None
    rows = run.rows
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    features = list(dict.fromkeys(row["feature"] for row in run.new_ids))
    plots = []
    for task in tasks:
        plot = charts.drift(rows, task, "label_rate", f"label rate: {task}")
        plots.append(plot)
    plot = charts.drift(rows, tasks[0], "examples", "examples")
    plots.append(plot)
    for feature in features:
        plot = charts.new_ids(rows, run.new_ids, feature)
        plots.append(plot)

    domains = {row["domain"] for row in rows}
    drawn = charts.largest(rows)
    return DataPlots(
        plots=_place_all("drift", DATA_HEIGHT, plots),
        domains_left_out=len(domains) - len(drawn),
        has_new_ids=bool(features),
    )


def _place_all(
    name: str,
    height: int,
    plots: Iterable[Part],
) -> list[Markup]:
    """Render plots as divs with the ids <name>-0, <name>-1, ..."""
    return [place_figure(plot, f"{name}-{i}", height) for i, plot in enumerate(plots)]
