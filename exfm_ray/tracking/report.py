"""report.html: a run to look at, whole or not."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from exfm_ray.tracking import charts
from exfm_ray.tracking.html_page import STYLE, Part, missing_supervision, place_figure, write_page
from exfm_ray.tracking.plot_styles import at_serving
from exfm_ray.tracking.run_files import Row, RunFiles, panels
from exfm_ray.tracking.timeline import PAUSE_S, bars, seconds

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
GAINS = (
    "NE gain is over the same model's labels arm; the transfer ratio is the share of the FM's NE gain on the same examples that an arm has. "
    "The least NE of each model is bold. "
)
PERCENT = {"ne_gain", "fm_ne_gain"}
DARK = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #15181c; --line: #3a3f45 } }
body { color: var(--ink); background: var(--paper) }
.js-plotly-plot :is(.cartesianlayer .xtick, .cartesianlayer .ytick, .infolayer) text { fill: var(--ink) !important }
@media (prefers-color-scheme: dark) {
  .js-plotly-plot :is(.gridlayer, .zerolinelayer) path { stroke: var(--line) !important }
  .js-plotly-plot .cartesianlayer .scatterlayer [style*="rgb(0, 0, 0)"] { stroke: var(--ink) !important }
  .js-plotly-plot .scatterlayer .point[style*="fill: rgb(0, 0, 0)"] { fill: var(--ink) !important }
  .js-plotly-plot .legend .traces :is(.legendlines, .legendpoints) path[style*="rgb(0, 0, 0)"] { stroke: var(--ink) !important }
  .js-plotly-plot .legend .scatterpts[style*="fill: rgb(0, 0, 0)"] { fill: var(--ink) !important }
  .js-plotly-plot .legend .bg { fill: transparent !important }
}
"""
TABLES = """
.lacks { border-left: .3rem solid #c60; padding-left: .6rem; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0 } dt { opacity: .7 } dd { margin: 0; overflow-wrap: anywhere }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; width: 100%; margin-bottom: 1rem }
th, td { padding: .25rem .35rem; border-bottom: 1px solid var(--line); text-align: right } th { vertical-align: bottom }
td:nth-child(-n+4), th:nth-child(-n+4) { text-align: left } tr.best td { font-weight: 600 }
@media (max-width: 1000px) {
  thead { display: none } tr { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; padding: .5rem 0; border-bottom: 1px solid var(--line) }
  td, td:nth-child(-n+4) { display: flex; justify-content: space-between; border: 0; padding: .05rem 0; text-align: right; overflow-wrap: anywhere }
  td::before { content: attr(data-name); opacity: .7; font-weight: 400; padding-right: .5rem } td:empty { display: none }
}
@media (max-width: 480px) { dl { grid-template-columns: 1fr } dd { margin-bottom: .3rem } }
"""


def write_report(folder: Path) -> Path:
    """Write <folder>/report.html from the run's files; returns its path. UserError where the folder
    holds no run."""
    run = RunFiles.open(folder)
    body = run_facts(run) + _figures(run) + _windows(run) + _times(run) + _drift(run)
    write_page(folder / "report.html", run.name, body, STYLE + DARK + TABLES)
    return folder / "report.html"


def run_facts(run: RunFiles) -> str:
    """What was run."""
    data, fm, vm = (run.setting(name, {}) for name in ("data", "fm", "vm"))
    worked = [at for span in run.spans for at in (span["started_s"], span["ended_s"])]
    unit = "passes" if run.static else f"of {run.windows} windows"
    facts = {
        "state": f"{run.state}: "
        + ", ".join(f"{name} {done} {unit}" for name, done in run.done.items()),
        "run": f"{_date(min(worked))} to {_date(max(worked))}" if worked else "",
        "data": f"{data.get('source')}, {run.windows} windows; {_role_of_windows(run)}",
        "FM": f"{_model(fm.get('model', {}))}; {_training(fm)}",
        "supervision": f"by the snapshot that has learnt up to {run.setting('das.fm_lag', 1)} window(s) before"
        if vm.get("models")
        else "",
        "vertical models": f"{_students(vm)}; {_training(vm)}" if vm.get("models") else "",
        "arms": ", ".join(vm.get("arms", ())) if vm.get("models") else "",
        "shared rows": _shared(run)
        if any("share" in arm.split("+") for arm in vm.get("arms", ()))
        else "",
        "histories": _remembered(run)
        if any("history" in arm.split("+") for arm in vm.get("arms", ()))
        else "",
        "further cost at serving": _serving(vm.get("arms", ())) if vm.get("models") else "",
        "weights": _weights(run) if vm.get("models") else "",
        "peak memory": f"{run.summary['peak_memory_bytes'] / 2**30:.1f} GiB" if run.summary else "",
        "seed": f"{run.setting('seed', 0)}",
        "versions": ", ".join(run.versions),
    }
    lacks = "".join(
        f"<p class=lacks>{escape(line)}</p>" for line in missing_supervision(run.summary or {})
    )
    return (
        lacks
        + "<dl>"
        + "".join(f"<dt>{name}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items() if fact)
        + "</dl>"
    )


def _role_of_windows(run: RunFiles) -> str:
    if run.static:
        return f"a static set: those before window {run.setting('fm.static.validation_window')} are learnt in passes, which that one stops"
    return f"the first {run.setting('metrics.warmup_windows', 0)} are warm-up: in no average"


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _model(model: Mapping[str, Any]) -> str:
    """A network and its sizes, those at rest left out."""
    sizes = ", ".join(
        f"{name} {value}"
        for name, value in model.items()
        if name != "type" and value not in ({}, [], 0, 0.0, None, False)
    )
    return f"{model.get('type')} ({sizes})"


def _training(trainer: Mapping[str, Any]) -> str:
    rates = trainer.get("optimizer", {})
    return (
        f"batch {trainer.get('batch_size')}, rates {rates.get('table_lr')} (tables) and {rates.get('dense_lr')} (dense), "
        f"{trainer.get('workers')} worker(s), {trainer.get('device')}, {trainer.get('precision')}"
    )


def _students(vm: Mapping[str, Any]) -> str:
    told = []
    for student in vm["models"]:
        tasks = student.get("task", student.get("tasks", ()))
        tasks = [tasks] if isinstance(tasks, str) else tasks
        told.append(
            f"{student['name']} ({student['domain']}, {' and '.join(tasks)}, {(student.get('model') or vm['model'])['type']})"
        )
    return ", ".join(told)


def _serving(arms: Sequence[str]) -> str:
    """Which arms cost what beside labels, in the arms' order."""
    costs = {
        cost: [arm for arm in arms if at_serving(arm) == cost]
        for cost in ("nothing", "a feature store")
    }
    return "; ".join(f"{cost}: {', '.join(those)}" for cost, those in costs.items() if those)


def _weights(run: RunFiles) -> str:
    kd, ah, sa = (run.setting(f"distillation.{part}", {}) for part in ("kd", "ah", "sa"))
    return f"kd: w {kd.get('w')}; ah: w {ah.get('w')}, alpha {ah.get('alpha')}, beta {ah.get('beta')}; sa: w {sa.get('w')}"


def _shared(run: RunFiles) -> str:
    """How arms with +share take the teacher's rows; settings that do not matter are left out."""
    share = run.setting("distillation.share", {})
    matter = (
        "mode",
        *{"average": ("weight",), "unseen": ("unseen_below",)}.get(share.get("mode"), ()),
        "optimizer",
        "projection",
    )
    told = ", ".join(f"{name} {share.get(name)}" for name in matter)
    return f"rate {share.get('table_lr')} (tables), of tables {', '.join(share.get('tables', ())) or 'all'}, {told}"


def _remembered(run: RunFiles) -> str:
    """What arms with +history are given."""
    history = run.setting("distillation.history", {})
    kept = f"the last {history.get('last')} in order" if history.get("last") else "the mean"
    key = history.get("key") or "the schema's group_by"
    return f"layer {history.get('layer')}, by {key}, {history.get('dim')} numbers an example, {kept}, drift {history.get('drift')}"


def _figures(run: RunFiles) -> str:
    """The table over all windows, and gains to look at."""
    if not run.figures:
        return "<h2>Figures</h2><p>No window after the warm-up has been evaluated yet.</p>"
    vms = sorted(
        (row for row in run.figures if row["role"] == "vm" and row["ne"] is not None),
        key=lambda row: -row["ne"],
    )
    best = {
        (row["model"], row["domain"], row["task"]): row["arm"] for row in vms
    }  # the last one stays: the least NE
    columns = {
        key: title
        for key, title in COLUMNS.items()
        if any(row.get(key) is not None for row in run.figures)
    }
    if not run.static:
        columns.pop("log_loss", None)
    wanted = {(row["domain"], row["task"]) for row in run.figures if row["role"] == "vm"}
    rows = [
        row for row in run.figures if row["role"] == "vm" or row["domain"] == "all" or not wanted
    ]
    rows.sort(key=lambda row: (row["role"] == "vm", row["model"], row["task"]))
    body = "".join(
        _table_row(row, columns, best.get((row["model"], row["domain"], row["task"])) == row["arm"])
        for row in rows
    )
    head = "".join(f"<th>{title}</th>" for title in columns.values())
    pairs = list(dict.fromkeys((row["model"], row["task"]) for row in rows if row["role"] == "vm"))
    plots = [charts.gains(run.figures, *pair) for pair in pairs]
    grid = _grid(((plot, 230) for plot in plots if plot["data"]), "gain")
    what = "the best pass" if run.static else "all windows after the warm-up that are done"
    return (
        f"<h2>Figures over {what}</h2><p>{GAINS if pairs else ''}A run has one seed, so no figure here has an interval: repeat it with other seeds "
        f"before you trust small differences.</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{grid}"
    )


def _table_row(
    row: Row,
    columns: Mapping[str, str],
    best: bool,
) -> str:
    cells = "".join(
        f'<td data-name="{title}">{_cell(key, row.get(key))}</td>' for key, title in columns.items()
    )
    return f"<tr{' class=best' if best else ''}>{cells}</tr>"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return (
            f"{value:+.2%}"
            if key in PERCENT
            else f"{value:.2f}"
            if key == "transfer_ratio"
            else f"{value:.4f}"
        )
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def _windows(run: RunFiles) -> str:
    """NE and calibration, window by window."""
    drawn = [panel for panel in panels(run) if panel.curves]
    if not drawn:
        return ""
    over = "pass" if run.static else "window"
    warmup = run.setting("metrics.warmup_windows", 0)
    ne = _grid(((charts.by_window(panel, "ne", warmup), 350) for panel in drawn), "ne")
    calibration = _grid(
        ((charts.by_window(panel, "calibration", warmup), 350) for panel in drawn), "calibration"
    )
    return (
        f"<h2>Normalised entropy by {over}</h2><p>Each point comes from a model that had not learnt its window"
        f"{': the validation window, after each pass' if run.static else ''}. Lower is better; 1 is no better than the mean rate. "
        f"{'' if run.static else 'With a vertical model stands the FM on the same examples. The warm-up is shaded. '}"
        "Points far above the rest come into view with the button <i>Autoscale</i>.</p>"
        f"{ne}<h2>Calibration by {over}</h2><p>Mean prediction over mean label: 1 is right, more is too high.</p>{calibration}"
    )


def _times(run: RunFiles) -> str:
    """What worked when, and where the time went."""
    found, cut = bars(run.spans)
    if not found:
        return ""
    totals = seconds(found)
    height = 140 + 55 * len(totals)
    pauses = (
        f" Pauses of more than {PAUSE_S:.0f} s in which no role worked, {cut:,.0f} s in all, are cut out."
        if cut
        else ""
    )
    return (
        "<h2>Timeline</h2><p>Which window (the number in a bar) each role worked on when; a role's waiting for data or for a snapshot is drawn "
        f"before the phase that it belongs to. The start of the workers is not shown.{pauses}</p>"
        f"{place_figure(charts.timeline(found), 'timeline', height)}<h2>Where the time went</h2>"
        f"{place_figure(charts.shares(totals, found), 'time', height)}"
    )


def _drift(run: RunFiles) -> str:
    """How the data change. Not of a static set, whose windows have no order in time."""
    if run.static or not run.rows:
        return ""
    tasks = list(dict.fromkeys(row["task"] for row in run.rows))
    plots = [charts.drift(run.rows, task, "label_rate", f"label rate: {task}") for task in tasks]
    plots.append(charts.drift(run.rows, tasks[0], "examples", "examples"))
    features = list(dict.fromkeys(row["feature"] for row in run.new_ids))
    plots += [charts.new_ids(run.rows, run.new_ids, feature) for feature in features]
    left_out = len({row["domain"] for row in run.rows}) - len(charts.largest(run.rows))
    some = (
        f"<p>{left_out} smaller domains without a vertical model are left out.</p>"
        if left_out
        else ""
    )
    new = (
        "<p>New ids: the share of a window's examples whose id no earlier window had.</p>"
        if features
        else ""
    )
    return (
        f"<h2>The data by window</h2>{some}{new}{_grid(((plot, 370) for plot in plots), 'drift')}"
    )


def _grid(plots: Iterable[tuple[Part, int]], name: str) -> str:
    shown = "".join(
        place_figure(plot, f"{name}-{i}", height) for i, (plot, height) in enumerate(plots)
    )
    return f'<div class="grid">{shown}</div>'
