"""plots.html: the trials and gains of a sweep as plots, in one file with plotly.js in it.

The page fetches nothing from elsewhere. Arms differ by symbol and pattern as well as by color.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from exfm_ray.config.tune import Distribution, TuneConfig, default_space
from exfm_ray.tracking.html_page import LAYOUT, Part, place_figure, write_page
from exfm_ray.tracking.plot_styles import arm_order, style_of_arm
from tuning.holdout import VARIANTS
from tuning.results import Search, Trial
from tuning.trial_scatter import ne_against_setting, ne_range

LEGEND = (
    "A point is a trial: its NE over the validation windows, lower is better. Hollow: calibration "
    "out of bounds. Faint: stopped early, so its NE is of fewer windows. Ringed: the best of its "
    "arm. Failed trials are left out. NE axes show most of the trials; those far above come into "
    "view with the button <i>Autoscale</i>."
)
IMPORTANCE_TITLE = (
    "Importance: fraction of the differences in NE between complete trials that each setting "
    "explains"
)
GAINS_TITLE = (
    "NE gain over the tuned labels arm on the holdout windows, with 95 % confidence interval "
    "over seeds"
)


def write_plots(
    tune: TuneConfig,
    trials: Sequence[Trial],
    summary: Mapping[str, Any],
    path: Path,
) -> None:
    """Write the page to `path`.

    Args:
        summary: what `tuning.analysis.analyze` returned.
    """
    first_scored, last_scored = tune.validation_windows
    first_held_out, last_held_out = tune.holdout_windows
    title = (
        f"{summary['name']}: trials scored on windows {first_scored} to {last_scored}, "
        f"gains on windows {first_held_out} to {last_held_out}"
    )
    sections = [
        _student_section(tune, number, name, trials, student_summary)
        for number, (name, student_summary) in enumerate(summary["students"].items())
    ]
    write_page(path, title, f"<p>{LEGEND}</p>{''.join(sections)}")


def _student_section(
    tune: TuneConfig,
    number: int,
    name: str,
    trials: Sequence[Trial],
    student_summary: Mapping[str, Any],
) -> str:
    """A student's part of the page as HTML. Arms have the same order everywhere."""
    arms: dict[str, list[Trial]] = {}
    for arm in sorted(tune.arms, key=arm_order):
        arms[arm] = _shown_trials(trials, Search(name, arm))
    space = _searched_space(tune)
    trial_plots = _trial_plots(space, arms, number)

    bars = _importance(student_summary["arms"], list(space))
    importance = "<p>Too few complete trials.</p>"
    if bars["data"]:
        height = 130 + 12 * len(space) * len(arms)
        importance = place_figure(bars, f"importance-{number}", height)

    intervals = _gains(student_summary["arms"])
    gains = "<p>Nothing to compare.</p>"
    if intervals["data"]:
        height = 130 + 30 * len(intervals["data"])
        gains = place_figure(intervals, f"gains-{number}", height)

    return (
        f"<h2>{escape(name)}</h2>"
        f'<h3>NE against each setting</h3><div class="grid">{trial_plots}</div>'
        f"<h3>{IMPORTANCE_TITLE}</h3>{importance}"
        f"<h3>{GAINS_TITLE}</h3>{gains}"
    )


def _shown_trials(trials: Sequence[Trial], search: Search) -> list[Trial]:
    """The trials of one student and arm that have an NE."""
    return [
        trial
        for trial in trials
        if trial.search == search and trial.curve and trial.state != "failed"
    ]


def _searched_space(tune: TuneConfig) -> dict[str, Distribution]:
    """The settings that at least one arm searches."""
    searched: set[str] = set()
    for arm in tune.arms:
        searched |= tune.space_of(arm).keys()
    space = tune.space or default_space()
    return {setting: distribution for setting, distribution in space.items() if setting in searched}


def _trial_plots(
    space: Mapping[str, Distribution],
    arms: Mapping[str, Sequence[Trial]],
    number: int,
) -> str:
    """NE against each setting, as HTML."""
    every_trial = [trial for trials in arms.values() for trial in trials]
    ne_axis = ne_range(every_trial)
    if ne_axis is None or not space:
        return "<p>No trial has an NE.</p>"
    figures = [
        ne_against_setting(setting, distribution, arms, ne_axis)
        for setting, distribution in space.items()
    ]
    divs = [
        place_figure(figure, f"trials-{number}-{position}", 310)
        for position, figure in enumerate(figures)
    ]
    return "".join(divs)


def _importance(arms: Mapping[str, Any], settings: Sequence[str]) -> Part:
    """Bars: a setting's importance in each arm that searches it."""
    data = []
    for arm, figures in arms.items():
        importance = figures["importance"]
        if not importance:
            continue
        style = style_of_arm(arm)
        bars: Part = {
            "type": "bar",
            "orientation": "h",
            "name": arm,
            "x": list(importance.values()),
            "y": list(importance),
            "marker": {
                "color": style.color,
                "pattern": {"shape": style.pattern},
                "line": {"width": 1, "color": "#222"},
            },
            "hovertemplate": f"{arm}, %{{y}}: %{{x:.1%}}<extra></extra>",
        }
        data.append(bars)

    setting_axis = {
        "categoryorder": "array",
        "categoryarray": list(settings),
        "autorange": "reversed",
        "automargin": True,
    }
    layout = {
        **LAYOUT,
        "barmode": "group",
        "xaxis": {"tickformat": ".0%", "rangemode": "tozero"},
        "yaxis": setting_axis,
    }
    return {"data": data, "layout": layout}


def _gains(arms: Mapping[str, Any]) -> Part:
    """Gains in percent with their intervals: tuned filled, untuned hollow."""
    data = []
    for arm, figures in arms.items():
        for variant in VARIANTS:
            gain = figures[variant]["ne_gain"]
            if gain:
                data.append(_gain_point(arm, variant, gain))
    layout = {
        **LAYOUT,
        "xaxis": {"title": {"text": "NE gain, %"}, "zeroline": True},
        "yaxis": {"autorange": "reversed", "automargin": True},
        "showlegend": False,
    }
    return {"data": data, "layout": layout}


def _gain_point(
    arm: str,
    variant: str,
    gain: Mapping[str, Any],
) -> Part:
    style = style_of_arm(arm)
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
            "symbol": style.symbol + "-open" * (variant == "untuned"),
            "color": style.color,
            "size": 12,
            "line": {"width": 2},
        },
        "hovertemplate": f"{arm} {variant}, {gain['seeds']} seeds: %{{x:.3f}} %<extra></extra>",
    }
    if low is None:  # one seed has no interval
        return point
    interval = {
        "type": "data",
        "symmetric": False,
        "array": [100 * (high - mean)],
        "arrayminus": [100 * (mean - low)],
        "thickness": 2,
    }
    return point | {"error_x": interval}
