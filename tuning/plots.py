"""plots.html: a sweep to look at. One file with plotly.js in it, nothing from elsewhere; arms
differ by symbol and pattern as well as by colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from exfm_ray.config.tune import Distribution, TuneConfig, default_space
from exfm_ray.tracking.html_page import LAYOUT, Part, place_figure, write_page
from exfm_ray.tracking.plot_styles import listing, mark_of
from tuning.holdout import best_trial
from tuning.results import Search, Trial
from tuning.space import encoded

LEGEND = (
    "A point is a trial: its NE over the score windows, lower is better. Hollow: calibration out of bounds. Faint: stopped early, so its NE "
    "is of fewer windows. Ringed: the best of its arm. Trials that failed are left out. NE axes show most of the trials; those far above come into "
    "view with the button <i>Autoscale</i>."
)
RING: Part = {
    "marker": {"symbol": "circle-open", "size": 20, "color": "#000", "line": {"width": 2}},
    "hoverinfo": "skip",
    "hovertemplate": None,
}


def write_plots(
    tune: TuneConfig,
    trials: Sequence[Trial],
    summary: Mapping[str, Any],
    path: Path,
) -> None:
    """Write the page. `summary`: what `tuning.analysis.analyse` has returned."""
    (a, b), (c, d) = tune.validation_windows, tune.holdout_windows
    title = f"{summary['name']}: trials scored on windows {a} to {b}, judged on windows {c} to {d}"
    students = "".join(
        _student(tune, number, name, trials, told)
        for number, (name, told) in enumerate(summary["students"].items())
    )
    write_page(path, title, f"<p>{LEGEND}</p>{students}")


def _student(
    tune: TuneConfig,
    number: int,
    name: str,
    trials: Sequence[Trial],
    told: Mapping[str, Any],
) -> str:
    """A student's part of the page. Arms come in one order everywhere."""
    arms: dict[str, list[Trial]]
    arms = {
        arm: [
            t for t in trials if t.search == Search(name, arm) and t.curve and t.state != "failed"
        ]
        for arm in sorted(tune.arms, key=listing)
    }
    space = {
        setting: d
        for setting, d in (tune.space or default_space()).items()
        if any(setting in tune.space_of(arm) for arm in arms)
    }
    extent = _extent([trial for those in arms.values() for trial in those])
    plots = [_against(setting, d, arms, extent) for setting, d in space.items()] if extent else []
    grid = (
        "".join(place_figure(plot, f"trials-{number}-{i}", 310) for i, plot in enumerate(plots))
        or "<p>No trial has an NE.</p>"
    )
    shares = _importance(told["arms"], list(space))
    gains = _gains(told["arms"])
    below = (
        place_figure(shares, f"importance-{number}", 130 + 12 * len(space) * len(arms))
        if shares["data"]
        else "<p>Too few complete trials.</p>"
    )
    last = (
        place_figure(gains, f"gains-{number}", 130 + 30 * len(gains["data"]))
        if gains["data"]
        else "<p>Nothing to compare.</p>"
    )
    return (
        f'<h2>{escape(name)}</h2><h3>NE against each setting</h3><div class="grid">{grid}</div>'
        f"<h3>Importance: share of each setting in the differences of NE between complete trials</h3>{below}"
        f"<h3>NE gain over the tuned labels arm on the judge windows, with 95 % confidence interval over seeds</h3>{last}"
    )


def _extent(trials: Sequence[Trial]) -> tuple[float, float] | None:
    """The range of NE axes: from the best trial to the worst that is not far above the rest
    (Tukey's outer fence)."""
    values = np.array([trial.curve[-1].ne for trial in trials])
    if not len(values):
        return None
    low, high = np.quantile(values, [0.25, 0.75])
    shown = values[values <= high + 3 * (high - low)]
    margin = 0.08 * float(np.ptp(shown)) + 1e-4
    return float(shown.min()) - margin, float(shown.max()) + margin


def _against(
    setting: str,
    distribution: Distribution,
    arms: Mapping[str, Sequence[Trial]],
    extent: tuple[float, float],
) -> Part:
    """NE against a setting: for each arm its trials, and a ring around the best one."""
    data: list[Part] = []
    for arm, all_of_arm in arms.items():
        asked = [trial for trial in all_of_arm if setting in trial.settings]
        if asked:
            data += [_key(arm), _points(arm, asked, setting, distribution)]
            best = best_trial(all_of_arm, asked[0].search)
            if best in asked:  # it may not have been asked for this setting
                data.append(
                    _points(arm, [best], setting, distribution) | RING | {"name": f"best {arm}"}
                )
    return {
        "data": data,
        "layout": {
            **LAYOUT,
            "xaxis": _axis(setting, distribution),
            "yaxis": {"title": {"text": "NE"}, "range": list(extent), "tickformat": ".4~f"},
        },
    }


def _key(arm: str) -> Part:
    """An arm's entry in the legend: of a trace plotly would show the first point, hollow or
    faint."""
    marker = {
        "symbol": mark_of(arm).symbol,
        "color": mark_of(arm).colour,
        "size": 10,
        "line": {"width": 1.5},
    }
    return {
        "type": "scatter",
        "mode": "markers",
        "name": arm,
        "legendgroup": arm,
        "x": [None],
        "y": [None],
        "marker": marker,
        "showlegend": True,
    }


def _points(
    arm: str,
    trials: Sequence[Trial],
    setting: str,
    distribution: Distribution,
) -> Part:
    out = [
        trial.score is not None and trial.score > trial.curve[-1].ne for trial in trials
    ]  # that is what the score adds to NE for
    return {
        "type": "scatter",
        "mode": "markers",
        "name": arm,
        "legendgroup": arm,
        "showlegend": False,
        "x": [encoded(distribution, trial.settings[setting]) for trial in trials],
        "y": [trial.curve[-1].ne for trial in trials],
        "text": [
            f"{arm} trial {t.number}, {t.state}<br>NE {t.curve[-1].ne:.5f}, calibration {t.curve[-1].calibration:.3f}"
            for t in trials
        ],
        "hovertemplate": "%{text}<br>%{x}<extra></extra>",
        "marker": {
            "symbol": [mark_of(arm).symbol + "-open" * hollow for hollow in out],
            "color": mark_of(arm).colour,
            "size": 10,
            "line": {"width": 1.5},
            "opacity": [0.35 if trial.state == "stopped" else 1.0 for trial in trials],
        },
    }


def _axis(setting: str, distribution: Distribution) -> Part:
    """The whole range that is searched, or all choices in their order."""
    axis: Part = {"title": {"text": setting, "standoff": 8}}
    if distribution.choice:
        order = [str(encoded(distribution, choice)) for choice in distribution.choice]
        return axis | {
            "type": "category",
            "categoryorder": "array",
            "categoryarray": order,
            "range": [-0.5, len(order) - 0.5],
        }
    assert distribution.low is not None and distribution.high is not None
    ends = [
        math.log10(end) if distribution.log else end
        for end in (distribution.low, distribution.high)
    ]
    margin = 0.05 * (ends[1] - ends[0])
    axis["range"] = [ends[0] - margin, ends[1] + margin]
    if not distribution.log:
        return axis | {"type": "linear", "nticks": 6}
    return axis | {
        "type": "log",
        "dtick": "D2" if ends[1] - ends[0] < 2 else 1,
        "minorloglabels": "complete",
        "exponentformat": "e",
    }


def _importance(arms: Mapping[str, Any], settings: Sequence[str]) -> Part:
    """Bars: a setting's share in each arm that searches it."""
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": arm,
            "x": list(told["importance"].values()),
            "y": list(told["importance"]),
            "marker": {
                "color": mark_of(arm).colour,
                "pattern": {"shape": mark_of(arm).pattern},
                "line": {"width": 1, "color": "#222"},
            },
            "hovertemplate": f"{arm}, %{{y}}: %{{x:.1%}}<extra></extra>",
        }
        for arm, told in arms.items()
        if told["importance"]
    ]
    order = {
        "categoryorder": "array",
        "categoryarray": list(settings),
        "autorange": "reversed",
        "automargin": True,
    }
    return {
        "data": data,
        "layout": {
            **LAYOUT,
            "barmode": "group",
            "xaxis": {"tickformat": ".0%", "rangemode": "tozero"},
            "yaxis": order,
        },
    }


def _gains(arms: Mapping[str, Any]) -> Part:
    """Gains in percent with their intervals: tuned filled, untuned hollow."""
    shown = [
        (arm, variant, told[variant]["ne_gain"])
        for arm, told in arms.items()
        for variant in ("tuned", "untuned")
        if told[variant]["ne_gain"]
    ]
    axes = {
        "xaxis": {"title": {"text": "NE gain, %"}, "zeroline": True},
        "yaxis": {"autorange": "reversed", "automargin": True},
    }
    return {
        "data": [_gain(*one) for one in shown],
        "layout": {**LAYOUT, **axes, "showlegend": False},
    }


def _gain(
    arm: str,
    variant: str,
    gain: Mapping[str, Any],
) -> Part:
    mean = gain["mean"]
    low = gain["low"]
    high = gain["high"]
    point: Part = {
        "type": "scatter",
        "mode": "markers",
        "name": f"{arm} {variant}",
        "x": [100 * mean],
        "y": [f"{arm} {variant}"],
        "marker": {
            "symbol": mark_of(arm).symbol + "-open" * (variant == "untuned"),
            "color": mark_of(arm).colour,
            "size": 12,
            "line": {"width": 2},
        },
        "hovertemplate": f"{arm} {variant}, {gain['seeds']} seeds: %{{x:.3f}} %<extra></extra>",
    }
    if low is None:  # one seed has no interval
        return point
    reach = {
        "type": "data",
        "symmetric": False,
        "array": [100 * (high - mean)],
        "arrayminus": [100 * (mean - low)],
        "thickness": 2,
    }
    return point | {"error_x": reach}
