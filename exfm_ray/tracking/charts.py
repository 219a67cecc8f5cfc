"""The figures of report.html, as plotly's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exfm_ray.schema import ALL_DOMAINS
from exfm_ray.tracking.html_page import LAYOUT, Part
from exfm_ray.tracking.plot_styles import PHASES, PlotStyle, mark_of, numbered
from exfm_ray.tracking.run_files import Panel, Row
from exfm_ray.tracking.timeline import Bar

FORMATS = {
    "ne": ".4~f",
    "calibration": ".3~f",
    "label_rate": ".1~%",
    "examples": ".3~s",
    "share": ".1~%",
}
DECIMALS = {
    "ne": ".5f",
    "calibration": ".4f",
    "label_rate": ".3%",
    "examples": ",d",
    "share": ".2%",
}
DOMAINS = 7
"""More curves in one plot are a tangle."""
BAR_LINE = {"width": 1, "color": "#808080"}


def by_window(
    panel: Panel,
    figure: str,
    warmup: int,
) -> Part:
    """A figure (ne or calibration) of every arm and of the FM, window by window, those of the
    warm-up shaded; for a static set pass by pass."""
    data = [_curve(arm, rows, figure, mark_of(arm)) for arm, rows in panel.curves.items()]
    values = [
        row[figure] for rows in panel.curves.values() for row in rows if row[figure] is not None
    ]
    by = (
        "pass" if any("pass" in row for rows in panel.curves.values() for row in rows) else "window"
    )
    drawn = _lines(data, panel.title, by, figure, extent(values))
    if warmup and by == "window":
        shade = {
            "type": "rect",
            "x0": -0.5,
            "x1": warmup - 0.5,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"width": 0},
            "layer": "below",
        }
        drawn["layout"]["shapes"] = [shade | {"fillcolor": "rgba(128,128,128,0.15)"}]
    return drawn


def extent(values: Sequence[float]) -> list[float] | None:
    """The range of an axis: from the least value to the greatest that is not far above the rest
    (Tukey's outer fence)."""
    if not values:
        return None
    low, high = np.quantile(values, [0.25, 0.75])
    shown = [value for value in values if value <= high + 3 * (high - low)]
    margin = 0.08 * (max(shown) - min(shown)) + 1e-4
    return [min(shown) - margin, max(shown) + margin]


def largest(rows: Sequence[Row]) -> list[str]:
    """The domains that are drawn: all together, those of vertical models, then those with the most
    examples, up to `DOMAINS`."""
    examples: dict[str, int] = {}
    for row in rows:
        examples[row["domain"]] = max(examples.get(row["domain"], 0), row["examples"])
    wanted = {row["domain"] for row in rows if row["role"] == "vm"}
    order = sorted(
        examples,
        key=lambda domain: (domain != ALL_DOMAINS, domain not in wanted, -examples[domain], domain),
    )
    return order[: max(DOMAINS, len(wanted | {ALL_DOMAINS}))]


def drift(
    rows: Sequence[Row],
    task: str,
    figure: str,
    title: str,
) -> Part:
    """label_rate or examples of the largest domains, window by window. Any model that was evaluated
    on a domain tells it."""
    told: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["task"] == task:
            told.setdefault(row["domain"], {})[row["window"]] = row
    shown = largest(rows)
    if figure == "examples" and len(told) > 1:
        told.pop(ALL_DOMAINS, None)  # it would press the others into a line
    return _by_domain(told, shown, figure, title)


def new_ids(
    rows: Sequence[Row],
    told: Sequence[Row],
    feature: str,
) -> Part:
    """Share of the examples with ids that are new, in the domains that are drawn of `rows`. `told`:
    of new_ids.json."""
    shares: dict[str, dict[int, Row]] = {}
    for row in told:
        if row["feature"] == feature:
            shares.setdefault(row["domain"], {})[row["window"]] = row
    return _by_domain(shares, largest(rows), "share", f"new ids: {feature}")


def _by_domain(
    told: Mapping[str, Mapping[int, Row]],
    drawn: Sequence[str],
    figure: str,
    title: str,
) -> Part:
    """A figure of `told` (domain -> window -> row) in those of the domains `drawn` that it has; a
    domain looks the same in every plot."""
    marks = {domain: numbered(number) for number, domain in enumerate(drawn) if domain in told}
    data = [
        _curve(
            "all domains" if domain == ALL_DOMAINS else domain,
            [told[domain][w] for w in sorted(told[domain])],
            figure,
            mark,
        )
        for domain, mark in marks.items()
    ]
    return _lines(data, title, "window", figure, None)


def _curve(
    name: str,
    rows: Sequence[Row],
    figure: str,
    mark: PlotStyle,
) -> Part:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [row.get("pass", row["window"]) for row in rows],
        "y": [row[figure] for row in rows],
        "line": {"color": mark.colour, "dash": mark.dash, "width": 2},
        "marker": {"symbol": mark.symbol, "size": 8},
        "hovertemplate": f"{name}, %{{x}}: %{{y:{DECIMALS[figure]}}}<extra></extra>",
    }


def _lines(
    data: list[Part],
    title: str,
    by: str,
    figure: str,
    shown: list[float] | None,
) -> Part:
    x = {"title": {"text": by, "standoff": 8}, "tickformat": "d", "nticks": 8, "zeroline": False}
    y = {"tickformat": FORMATS[figure], "automargin": True, "zeroline": False} | (
        {"range": shown} if shown else {"rangemode": "tozero"}
    )
    above = (
        45 if len(data) == 1 else 55 + 20 * -(-len(data) // 2)
    )  # room for the legend, two names a line
    return {
        "data": data,
        "layout": {
            **LAYOUT,
            "title": _heading(title),
            "margin": {"l": 60, "r": 15, "t": above, "b": 45},
            "xaxis": x,
            "yaxis": y,
        },
    }


def timeline(found: Sequence[Bar]) -> Part:
    """Which window each role worked on when."""
    data = [_phase(phase, [bar for bar in found if bar.phase == phase]) for phase in PHASES]
    x = {"title": {"text": "seconds", "standoff": 8}, "rangemode": "tozero", "zeroline": False}
    layout = {
        "barmode": "overlay",
        "bargap": 0.35,
        "xaxis": x,
        "yaxis": _roles(found),
        "uniformtext": {"minsize": 8, "mode": "hide"},
    }
    return {"data": [part for part in data if part["x"]], "layout": {**LAYOUT, **layout}}


def _phase(phase: str, found: Sequence[Bar]) -> Part:
    shown = [str(bar.window) if phase != "waiting" else "" for bar in found]
    return {
        "type": "bar",
        "orientation": "h",
        "name": phase,
        "y": [bar.role for bar in found],
        "x": [bar.end - bar.start for bar in found],
        "base": [bar.start for bar in found],
        "text": shown,
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "customdata": [bar.window for bar in found],
        "hovertemplate": f"%{{y}}, {phase} window %{{customdata}}: %{{x:.2f}} s<extra></extra>",
        "marker": _filled(phase),
    }


def shares(totals: Mapping[str, Mapping[str, float]], found: Sequence[Bar]) -> Part:
    """Seconds of each role by phase."""
    data = []
    for phase in PHASES:
        spent = {role: phases[phase] for role, phases in totals.items() if phase in phases}
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": phase,
                "y": list(spent),
                "x": list(spent.values()),
                "marker": _filled(phase),
                "hovertemplate": f"%{{y}}, {phase}: %{{x:.1f}} s<extra></extra>",
            }
        )
    layout = {
        "barmode": "stack",
        "bargap": 0.35,
        "xaxis": {"title": {"text": "seconds", "standoff": 8}},
        "yaxis": _roles(found),
    }
    legend = {**LAYOUT["legend"], "traceorder": "normal"}
    return {
        "data": [part for part in data if part["x"]],
        "layout": {**LAYOUT, **layout, "legend": legend},
    }


def _filled(phase: str) -> Part:
    mark = PHASES[phase]
    pattern = {
        "shape": mark.pattern,
        "fillmode": "overlay",
        "fgcolor": "#fff",
        "fgopacity": 0.6,
        "size": 6,
        "solidity": 0.15,
    }
    return {
        "color": mark.colour,
        "line": BAR_LINE,
        **({"pattern": pattern} if mark.pattern else {}),
    }


def _roles(found: Sequence[Bar]) -> Part:
    order = sorted(
        {bar.role for bar in found},
        key=lambda role: (("fm", "das").index(role) if role in ("fm", "das") else 2, role),
    )
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": order,
        "autorange": "reversed",
        "automargin": True,
    }


def gains(
    figures: Sequence[Row],
    model: str,
    task: str,
) -> Part:
    """NE gains over the labels arm in percent: the arms, and the FM on the same examples."""
    rows = [
        row
        for row in figures
        if row["role"] == "vm"
        and (row["model"], row["task"]) == (model, task)
        and row["ne_gain"] is not None
    ]
    points = [(row["arm"], row["ne_gain"]) for row in rows if row["arm"] != "labels"]
    points += [("fm", row["fm_ne_gain"]) for row in rows[:1] if row["fm_ne_gain"] is not None]
    data: list[Any] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": arm,
            "x": [100 * gain],
            "y": [arm],
            "hovertemplate": f"{arm}: %{{x:.3f}} %<extra></extra>",
            "marker": {"symbol": mark_of(arm).symbol, "color": mark_of(arm).colour, "size": 12},
        }
        for arm, gain in points
    ]
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
    return {"data": data, "layout": {**LAYOUT, **layout}}


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
