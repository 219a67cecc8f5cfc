"""The plots of report.html, as plotly's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exfm_ray.schema import ALL_DOMAINS
from exfm_ray.tracking.html_page import LAYOUT, Part
from exfm_ray.tracking.plot_styles import (
    PHASE_STYLES,
    PlotStyle,
    style_of_arm,
    style_of_domain,
)
from exfm_ray.tracking.run_files import Panel, Row
from exfm_ray.tracking.timeline import Bar

FORMATS = {
    "ne": ".4~f",
    "calibration": ".3~f",
    "label_rate": ".1~%",
    "examples": ".3~s",
    "share": ".1~%",
}
"""Figure -> format of the numbers on its axis."""
DECIMALS = {
    "ne": ".5f",
    "calibration": ".4f",
    "label_rate": ".3%",
    "examples": ",d",
    "share": ".2%",
}
"""Figure -> format of a value under the mouse."""
MAX_DOMAINS = 7
"""More curves in one plot cannot be distinguished."""
BAR_LINE = {"width": 1, "color": "#808080"}
WARMUP_SHADE = {
    "type": "rect",
    "x0": -0.5,
    "yref": "paper",
    "y0": 0,
    "y1": 1,
    "line": {"width": 0},
    "layer": "below",
    "fillcolor": "rgba(128,128,128,0.15)",
}


def by_window(
    panel: Panel,
    figure: str,
    warmup: int,
) -> Part:
    """Plot a figure of every arm and of the FM over windows, or passes of a static set.

    Args:
        figure: ne or calibration.
        warmup: number of windows to shade.
    """
    data = []
    values = []
    unit = "window"
    for arm, rows in panel.curves.items():
        style = style_of_arm(arm)
        curve = _curve(arm, rows, figure, style)
        data.append(curve)
        values += [value for value in curve["y"] if value is not None]
        if any("pass" in row for row in rows):
            unit = "pass"

    plot = _line_plot(data, panel.title, unit, figure, extent(values))
    if warmup and unit == "window":
        plot["layout"]["shapes"] = [WARMUP_SHADE | {"x1": warmup - 0.5}]
    return plot


def extent(values: Sequence[float]) -> list[float] | None:
    """The range of an axis: all values except those far above the rest (Tukey's outer fence)."""
    if not values:
        return None
    low, high = np.quantile(values, [0.25, 0.75])
    fence = high + 3 * (high - low)
    shown = [value for value in values if value <= fence]
    lowest = min(shown)
    highest = max(shown)
    margin = 0.08 * (highest - lowest) + 1e-4
    return [lowest - margin, highest + margin]


def largest(rows: Sequence[Row]) -> list[str]:
    """The domains that are drawn, up to `MAX_DOMAINS`.

    All domains together come first, then those of vertical models, which are always drawn, then
    those with the most examples.
    """
    examples: dict[str, int] = {}
    for row in rows:
        domain = row["domain"]
        most = examples.get(domain, 0)
        examples[domain] = max(most, row["examples"])
    of_students = {row["domain"] for row in rows if row["role"] == "vm"}

    def position(domain: str) -> tuple[bool, bool, int, str]:
        is_part = domain != ALL_DOMAINS
        is_foreign = domain not in of_students
        return is_part, is_foreign, -examples[domain], domain

    always_drawn = of_students | {ALL_DOMAINS}
    count = max(MAX_DOMAINS, len(always_drawn))
    return sorted(examples, key=position)[:count]


def drift(
    rows: Sequence[Row],
    task: str,
    figure: str,
    title: str,
) -> Part:
    """Plot label_rate or examples of the largest domains over windows.

    These do not depend on the model, so any model that was evaluated on a domain will do.
    """
    by_domain: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["task"] == task:
            windows = by_domain.setdefault(row["domain"], {})
            windows[row["window"]] = row
    if figure == "examples" and len(by_domain) > 1:
        by_domain.pop(ALL_DOMAINS, None)  # its curve would flatten the others
    drawn = largest(rows)
    return _by_domain(by_domain, drawn, figure, title)


def new_ids(
    rows: Sequence[Row],
    new_id_rows: Sequence[Row],
    feature: str,
) -> Part:
    """Plot the fraction of examples whose id is new, for the largest domains.

    Args:
        rows: of metrics.jsonl; they determine the domains.
        new_id_rows: of new_ids.json.
    """
    by_domain: dict[str, dict[int, Row]] = {}
    for row in new_id_rows:
        if row["feature"] == feature:
            windows = by_domain.setdefault(row["domain"], {})
            windows[row["window"]] = row
    drawn = largest(rows)
    return _by_domain(by_domain, drawn, "share", f"new ids: {feature}")


def _by_domain(
    by_domain: Mapping[str, Mapping[int, Row]],
    drawn: Sequence[str],
    figure: str,
    title: str,
) -> Part:
    """Plot a figure of `by_domain` (domain -> window -> row) for the domains `drawn`.

    A domain looks the same in every plot.
    """
    data = []
    for number, domain in enumerate(drawn):
        if domain not in by_domain:
            continue
        rows = by_domain[domain]
        in_order = [rows[window] for window in sorted(rows)]
        name = "all domains" if domain == ALL_DOMAINS else domain
        style = style_of_domain(number)
        curve = _curve(name, in_order, figure, style)
        data.append(curve)
    return _line_plot(data, title, "window", figure, None)


def _curve(
    name: str,
    rows: Sequence[Row],
    figure: str,
    style: PlotStyle,
) -> Part:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [row.get("pass", row["window"]) for row in rows],
        "y": [row[figure] for row in rows],
        "line": {"color": style.color, "dash": style.dash, "width": 2},
        "marker": {"symbol": style.symbol, "size": 8},
        "hovertemplate": f"{name}, %{{x}}: %{{y:{DECIMALS[figure]}}}<extra></extra>",
    }


def _line_plot(
    data: list[Part],
    title: str,
    unit: str,
    figure: str,
    y_range: list[float] | None,
) -> Part:
    y_axis: Part = {"tickformat": FORMATS[figure], "automargin": True, "zeroline": False}
    if y_range:
        y_axis["range"] = y_range
    else:
        y_axis["rangemode"] = "tozero"
    layout = {
        "title": _heading(title),
        "margin": {"l": 60, "r": 15, "t": _space_above(len(data)), "b": 45},
        "xaxis": {
            "title": {"text": unit, "standoff": 8},
            "tickformat": "d",
            "nticks": 8,
            "zeroline": False,
        },
        "yaxis": y_axis,
    }
    return {"data": data, "layout": {**LAYOUT, **layout}}


def _space_above(curves: int) -> int:
    """Pixels for the title and for the legend, which has two names per line."""
    if curves == 1:
        return 45
    legend_lines = -(-curves // 2)
    return 55 + 20 * legend_lines


def timeline(bars: Sequence[Bar]) -> Part:
    """Plot which window each role worked on when."""
    data = [_phase(phase, [bar for bar in bars if bar.phase == phase]) for phase in PHASE_STYLES]
    layout = {
        "barmode": "overlay",
        "bargap": 0.35,
        "xaxis": {
            "title": {"text": "seconds", "standoff": 8},
            "rangemode": "tozero",
            "zeroline": False,
        },
        "yaxis": _role_axis(bars),
        "uniformtext": {"minsize": 8, "mode": "hide"},
    }
    return {"data": _non_empty(data), "layout": {**LAYOUT, **layout}}


def _phase(phase: str, bars: Sequence[Bar]) -> Part:
    labels = ["" if phase == "waiting" else str(bar.window) for bar in bars]
    return {
        "type": "bar",
        "orientation": "h",
        "name": phase,
        "y": [bar.role for bar in bars],
        "x": [bar.end - bar.start for bar in bars],
        "base": [bar.start for bar in bars],
        "text": labels,
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "customdata": [bar.window for bar in bars],
        "hovertemplate": f"%{{y}}, {phase} window %{{customdata}}: %{{x:.2f}} s<extra></extra>",
        "marker": _bar_style(phase),
    }


def time_by_phase(
    totals: Mapping[str, Mapping[str, float]],
    bars: Sequence[Bar],
) -> Part:
    """Plot the seconds of each role by phase. `totals`: see `timeline.seconds_by_phase`."""
    data = []
    for phase in PHASE_STYLES:
        seconds = {role: phases[phase] for role, phases in totals.items() if phase in phases}
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": phase,
                "y": list(seconds),
                "x": list(seconds.values()),
                "marker": _bar_style(phase),
                "hovertemplate": f"%{{y}}, {phase}: %{{x:.1f}} s<extra></extra>",
            }
        )
    layout = {
        "barmode": "stack",
        "bargap": 0.35,
        "xaxis": {"title": {"text": "seconds", "standoff": 8}},
        "yaxis": _role_axis(bars),
        "legend": {**LAYOUT["legend"], "traceorder": "normal"},
    }
    return {"data": _non_empty(data), "layout": {**LAYOUT, **layout}}


def _non_empty(data: Sequence[Part]) -> list[Part]:
    return [trace for trace in data if trace["x"]]


def _bar_style(phase: str) -> Part:
    style = PHASE_STYLES[phase]
    marker: Part = {"color": style.color, "line": BAR_LINE}
    if style.pattern:
        marker["pattern"] = {
            "shape": style.pattern,
            "fillmode": "overlay",
            "fgcolor": "#fff",
            "fgopacity": 0.6,
            "size": 6,
            "solidity": 0.15,
        }
    return marker


def _role_axis(bars: Sequence[Bar]) -> Part:
    """An axis with the FM at the top, then the DAS, then the other roles by name."""
    first = ("fm", "das")

    def position(role: str) -> tuple[int, str]:
        if role in first:
            return first.index(role), role
        return len(first), role

    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": sorted({bar.role for bar in bars}, key=position),
        "autorange": "reversed",
        "automargin": True,
    }


def gains(
    figures: Sequence[Row],
    model: str,
    task: str,
) -> Part:
    """Plot NE gains over the labels arm in percent: the arms, and the FM on the same examples."""
    rows = [row for row in figures if _has_gain(row, model, task)]
    points = [(row["arm"], row["ne_gain"]) for row in rows if row["arm"] != "labels"]
    if rows and rows[0]["fm_ne_gain"] is not None:
        points.append(("fm", rows[0]["fm_ne_gain"]))
    layout = {
        "xaxis": {
            "title": {"text": "NE gain, %", "standoff": 8},
            "zeroline": True,
            "zerolinecolor": "#808080",
        },
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "title": _heading(f"{model}: {task}"),
        "margin": {"l": 60, "r": 15, "t": 40, "b": 45},
        "showlegend": False,
    }
    data: list[Any] = [_gain_point(arm, gain) for arm, gain in points]
    return {"data": data, "layout": {**LAYOUT, **layout}}


def _has_gain(
    row: Row,
    model: str,
    task: str,
) -> bool:
    """Whether a row is of this vertical model and task, and its gain is defined."""
    if row["role"] != "vm" or (row["model"], row["task"]) != (model, task):
        return False
    return row["ne_gain"] is not None


def _gain_point(arm: str, gain: float) -> Part:
    style = style_of_arm(arm)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": arm,
        "x": [100 * gain],
        "y": [arm],
        "hovertemplate": f"{arm}: %{{x:.3f}} %<extra></extra>",
        "marker": {"symbol": style.symbol, "color": style.color, "size": 12},
    }


def _heading(text: str) -> Part:
    return {
        "text": text,
        "x": 0,
        "xanchor": "left",
        "xref": "paper",
        "font": {"size": 14},
        "y": 0.97,
        "yanchor": "top",
    }
