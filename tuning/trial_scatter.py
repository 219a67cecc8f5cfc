"""Plots of NE against one setting: the trials of each arm, and a ring around the best trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from exfm_ray.config.tune import Distribution
from exfm_ray.tracking.html_page import LAYOUT, Part
from exfm_ray.tracking.plot_styles import style_of_arm
from tuning.holdout import best_trial
from tuning.results import Trial
from tuning.space import encoded

RING: Part = {
    "marker": {"symbol": "circle-open", "size": 20, "color": "#000", "line": {"width": 2}},
    "hoverinfo": "skip",
    "hovertemplate": None,
}


def ne_range(trials: Sequence[Trial]) -> tuple[float, float] | None:
    """Return the range of the NE axes, or None without trials.

    It reaches from the best trial to the worst one that is not far above the others (Tukey's outer
    fence).
    """
    nes = np.array([trial.curve[-1].ne for trial in trials])
    if not len(nes):
        return None
    lower_quartile, upper_quartile = np.quantile(nes, [0.25, 0.75])
    fence = upper_quartile + 3 * (upper_quartile - lower_quartile)
    shown = nes[nes <= fence]
    low = float(shown.min())
    high = float(shown.max())
    margin = 0.08 * float(np.ptp(shown)) + 1e-4
    return low - margin, high + margin


def ne_against_setting(
    setting: str,
    distribution: Distribution,
    arms: Mapping[str, Sequence[Trial]],
    ne_axis: tuple[float, float],
) -> Part:
    """Plot NE against a setting.

    Args:
        setting: dotted name; trials that do not have it are left out.
        distribution: the range or the choices that are searched.
        arms: arm -> its trials.
        ne_axis: ends of the NE axis.
    """
    data: list[Part] = []
    for arm, trials in arms.items():
        with_setting = [trial for trial in trials if setting in trial.settings]
        if not with_setting:
            continue
        data.append(_legend_entry(arm))
        data.append(_points(arm, with_setting, setting, distribution))

        best = best_trial(trials, with_setting[0].search)
        if best in with_setting:  # the best trial may not have the setting
            ring = _points(arm, [best], setting, distribution)
            data.append(ring | RING | {"name": f"best {arm}"})
    y_axis = {"title": {"text": "NE"}, "range": list(ne_axis), "tickformat": ".4~f"}
    layout = {**LAYOUT, "xaxis": _axis(setting, distribution), "yaxis": y_axis}
    return {"data": data, "layout": layout}


def _legend_entry(arm: str) -> Part:
    """An arm's entry in the legend, as a trace of its own.

    Plotly would show the first point of a trace, which may be hollow or faint.
    """
    style = style_of_arm(arm)
    marker = {"symbol": style.symbol, "color": style.color, "size": 10, "line": {"width": 1.5}}
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
    style = style_of_arm(arm)
    symbols = [style.symbol + "-open" * _is_out_of_bounds(trial) for trial in trials]
    opacity = [0.35 if trial.state == "stopped" else 1.0 for trial in trials]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": arm,
        "legendgroup": arm,
        "showlegend": False,
        "x": [encoded(distribution, trial.settings[setting]) for trial in trials],
        "y": [trial.curve[-1].ne for trial in trials],
        "text": [_hover_text(arm, trial) for trial in trials],
        "hovertemplate": "%{text}<br>%{x}<extra></extra>",
        "marker": {
            "symbol": symbols,
            "color": style.color,
            "size": 10,
            "line": {"width": 1.5},
            "opacity": opacity,
        },
    }


def _is_out_of_bounds(trial: Trial) -> bool:
    """Whether calibration is out of bounds, which is when the score is above NE."""
    return trial.score is not None and trial.score > trial.curve[-1].ne


def _hover_text(arm: str, trial: Trial) -> str:
    last = trial.curve[-1]
    return (
        f"{arm} trial {trial.number}, {trial.state}<br>"
        f"NE {last.ne:.5f}, calibration {last.calibration:.3f}"
    )


def _axis(setting: str, distribution: Distribution) -> Part:
    """The whole range that is searched, or all choices in their order."""
    axis: Part = {"title": {"text": setting, "standoff": 8}}
    if distribution.choice:
        categories = [str(encoded(distribution, choice)) for choice in distribution.choice]
        return axis | {
            "type": "category",
            "categoryorder": "array",
            "categoryarray": categories,
            "range": [-0.5, len(categories) - 0.5],
        }

    low, high = distribution.low, distribution.high
    assert low is not None and high is not None
    if distribution.log:
        low, high = math.log10(low), math.log10(high)
    margin = 0.05 * (high - low)
    axis["range"] = [low - margin, high + margin]
    if not distribution.log:
        return axis | {"type": "linear", "nticks": 6}
    return axis | {
        "type": "log",
        "dtick": "D2" if high - low < 2 else 1,
        "minorloglabels": "complete",
        "exponentformat": "e",
    }
