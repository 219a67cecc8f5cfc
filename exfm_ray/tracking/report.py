"""report.html: a run to look at. One file, no script, nothing from elsewhere; curves differ by dash as well as by colour."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from exfm_ray.files import read_json, write_text
from exfm_ray.tracking.recorder import read_metrics

# Okabe and Ito's colours, told apart without colour vision by lightness; each with a dash of its own.
STYLES = {
    "fm": ("#000000", "none"),
    "labels": ("#E69F00", "8 4"),
    "kd": ("#56B4E9", "2 3"),
    "ah": ("#009E73", "10 3 2 3"),
    "ah_sa": ("#D55E00", "4 2"),
}
COLUMNS = {
    "domain": "domain", "task": "task", "model": "model", "arm": "arm", "ne": "NE", "best_ne": "best NE", "auc": "AUC", "gauc": "gAUC",
    "log_loss": "log loss", "calibration": "calibration", "ne_gain": "NE gain", "transfer_ratio": "transfer ratio", "examples": "examples",
}  # fmt: skip
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 260, 60, 36
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1000px; padding: 1rem; color: #222; background: #fff }
h1, h2 { font-weight: 600 } .scroll { overflow-x: auto } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
td:nth-child(-n+4), th:nth-child(-n+4) { text-align: left } text { font: 12px system-ui, sans-serif }
"""
Row = Mapping[str, Any]


def write_report(folder: Path) -> Path:
    """Write <folder>/report.html from summary.json and metrics.jsonl; returns its path."""
    summary, rows = read_json(folder / "summary.json"), read_metrics(folder / "metrics.jsonl")
    figures = sorted(summary["figures"], key=lambda r: (r["domain"] != "all", r["domain"], r["task"], r["role"]))
    shown = {(r["domain"], r["task"]) for r in figures if r["role"] == "vm"} or {(r["domain"], r["task"]) for r in figures}
    curves = "".join(_chart(domain, task, rows) for domain, task in sorted(shown))
    roles = "".join(f"<li>{escape(role)}: {r['examples']:,} examples in {r['seconds']:.0f} s</li>" for role, r in summary["roles"].items())
    name = escape(summary["name"])
    windows = f"windows {summary['windows'][0]} to {summary['windows'][-1]}" if summary["windows"] else "no window after the warm-up"
    write_text(
        folder / "report.html",
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{STYLE}</style></head><body><h1>{name}</h1><p>Seed {summary['seed']}; figures over {windows}; "
        f"peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB.</p><ul>{roles}</ul><h2>Normalised entropy by window</h2>"
        f"<p>Each point comes from a model that had not seen its window. Lower is better; 1 is no better than the mean rate.</p>{curves}"
        f'<h2>All windows after the warm-up</h2><div class="scroll">{_table(figures)}</div></body></html>\n',
    )
    return folder / "report.html"


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{title}</th>" for title in COLUMNS.values())
    body = "".join("<tr>" + "".join(f"<td>{_cell(row.get(key))}</td>" for key in COLUMNS) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else escape(str(value))


def _chart(domain: str, task: str, rows: Sequence[Row]) -> str:
    """NE per window of every model and arm on one domain and task, as an SVG figure; for a static set, per pass on its validation window."""
    curves: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    validation = min((row["window"] for row in rows if "pass" in row), default=None)
    for row in rows:
        if (row["domain"], row["task"]) == (domain, task) and row["ne"] is not None and validation in (None, row["window"]):
            curves[row["model"], row["arm"]].append((row.get("pass", row["window"]), row["ne"]))
    if not curves:
        return ""
    points = [point for curve in curves.values() for point in curve]
    (x0, x1), ys = (min(p[0] for p in points), max(p[0] for p in points)), sorted(p[1] for p in points)
    y0, y1 = ys[0], ys[int(0.97 * (len(ys) - 1))]  # the first windows may lie far above the rest: they are cut off
    y0, y1 = y0 - 0.05 * (y1 - y0) - 1e-6, y1 + 0.05 * (y1 - y0) + 1e-6

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x0) / max(x1 - x0, 1) * (WIDTH - LEFT - 10)
        return f"{across:.1f},{10 + (y1 - min(y, y1)) / (y1 - y0) * (HEIGHT - BOTTOM - 10):.1f}"

    lines, legend = "", ""
    for i, ((_, arm), curve) in enumerate(sorted(curves.items(), key=lambda item: list(STYLES).index(item[0][1]))):
        colour, dash = STYLES[arm]
        pen = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        lines += f'<polyline points="{" ".join(place(x, y) for x, y in sorted(curve))}" {pen}/>'
        at = LEFT + 10 + i * 110
        legend += f'<path d="M{at},{HEIGHT + 12} h30" {pen}/><text x="{at + 35}" y="{HEIGHT + 16}">{escape(arm)}</text>'
    ticks = "".join(f'<text x="{LEFT - 6}" y="{place(x0, y).split(",")[1]}" text-anchor="end">{y:.3f}</text>' for y in (y0, (y0 + y1) / 2, y1))
    ticks += "".join(f'<text x="{place(x, y0).split(",")[0]}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x}</text>' for x in range(x0, x1 + 1))
    title = escape(f"{domain}, {task}")
    frame = f'<path d="M{LEFT},10 V{HEIGHT - BOTTOM} H{WIDTH - 10}" fill="none" stroke="#888"/>'
    return (
        f'<figure><figcaption><b>{title}</b></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT + 24}" width="{WIDTH}" role="img" '
        f'aria-label="NE by window: {title}">{frame}{ticks}{lines}{legend}</svg></figure>'
    )
