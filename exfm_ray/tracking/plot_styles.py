"""How arms, phases and domains look: each differs by dash, symbol or pattern as well as color."""

from __future__ import annotations

from typing import NamedTuple


class PlotStyle(NamedTuple):
    """A color, and what distinguishes a curve or bar without color. Values are plotly's."""

    color: str
    dash: str
    symbol: str
    pattern: str


# The colors of Okabe and Ito: their lightness differs, so they work without color vision.
INK = "#000000"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
VERMILION = "#D55E00"
BLUE = "#0072B2"
YELLOW = "#F0E442"
PURPLE = "#CC79A7"

ARM_STYLES = {
    "fm": PlotStyle(INK, "solid", "star", ""),
    "labels": PlotStyle(ORANGE, "dash", "circle", ""),
    "kd": PlotStyle(SKY, "dot", "square", "/"),
    "ah": PlotStyle(GREEN, "longdashdot", "diamond", "x"),
    "ah_sa": PlotStyle(VERMILION, "dashdot", "triangle-up", "."),
}
"""The FM and the arms' objectives, in the order in which they are listed everywhere."""

_SYMBOLS_WITH = {
    "share": {"labels": "hexagon", "kd": "cross", "ah": "diamond-tall", "ah_sa": "triangle-down"},
    "history": {"labels": "pentagon", "kd": "x", "ah": "diamond-wide", "ah_sa": "triangle-left"},
    "share+history": {
        "labels": "octagon",
        "kd": "hexagram",
        "ah": "star-diamond",
        "ah_sa": "triangle-right",
    },
}
_LINES_WITH = {
    "share": ("12px,3px", "-"),
    "history": ("3px,6px", "|"),
    "share+history": ("12px,3px,3px,3px", "+"),
}
"""Options of an arm -> dash and pattern."""


def style_of_arm(arm: str) -> PlotStyle:
    """The style of an arm or of the FM.

    An arm with options has the color of its objective and a symbol, dash and pattern of its own.
    """
    objective, _, options = arm.partition("+")
    plain = ARM_STYLES[objective]
    if not options:
        return plain
    dash, pattern = _LINES_WITH[options]
    symbols = _SYMBOLS_WITH[options]
    return PlotStyle(
        color=plain.color,
        dash=dash,
        symbol=symbols[objective],
        pattern=pattern,
    )


def at_serving(arm: str) -> str:
    """What an arm needs at serving beyond what the labels arm needs."""
    return "a feature store" if "history" in arm.split("+") else "nothing"


def arm_order(arm: str) -> tuple[int, str]:
    """A sort key for arms: by objective, each followed by the same one with options."""
    objective, _, options = arm.partition("+")
    position = list(ARM_STYLES).index(objective)
    return position, options


PHASE_STYLES = {
    "waiting": PlotStyle("rgba(128,128,128,0.15)", "solid", "circle", ""),
    "evaluate": PlotStyle(YELLOW, "solid", "circle", ""),
    "learn": PlotStyle(BLUE, "solid", "square", "/"),
    "score": PlotStyle(PURPLE, "solid", "diamond", "x"),
}
"""What a role does with a window."""

_COLORS = (INK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")


def style_of_domain(number: int) -> PlotStyle:
    """The style of the domain with this number; the first 280 all differ."""
    return PlotStyle(
        color=_COLORS[number % len(_COLORS)],
        dash=_DASHES[number % len(_DASHES)],
        symbol=_SYMBOLS[number % len(_SYMBOLS)],
        pattern="",
    )
