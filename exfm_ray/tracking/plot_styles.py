"""How arms, phases and domains look: each differs by dash, symbol or pattern as well as by
colour."""

from __future__ import annotations

from typing import NamedTuple


class PlotStyle(NamedTuple):
    """A colour and what tells it from the others without colour, in plotly's words."""

    colour: str
    dash: str
    symbol: str
    pattern: str


# Okabe and Ito's colours, told apart without colour vision by lightness.
INK = "#000000"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
VERMILION = "#D55E00"
BLUE = "#0072B2"
YELLOW = "#F0E442"
PURPLE = "#CC79A7"

MARKS = {
    "fm": PlotStyle(INK, "solid", "star", ""),
    "labels": PlotStyle(ORANGE, "dash", "circle", ""),
    "kd": PlotStyle(SKY, "dot", "square", "/"),
    "ah": PlotStyle(GREEN, "longdashdot", "diamond", "x"),
    "ah_sa": PlotStyle(VERMILION, "dashdot", "triangle-up", "."),
}
"""Of the FM and of the arms' objectives, in the order in which they are listed everywhere."""

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


def mark_of(arm: str) -> PlotStyle:
    """The mark of an arm, or of the FM: with options the objective's colour, and a symbol, a dash
    and a pattern of their own."""
    objective, _, options = arm.partition("+")
    if not options:
        return MARKS[objective]
    return PlotStyle(
        MARKS[objective].colour,
        _LINES_WITH[options][0],
        _SYMBOLS_WITH[options][objective],
        _LINES_WITH[options][1],
    )


def at_serving(arm: str) -> str:
    """What an arm costs at serving beside what labels alone cost."""
    return "a feature store" if "history" in arm.split("+") else "nothing"


def listing(arm: str) -> tuple[int, str]:
    """Sorts arms as they are listed: by objective, each with its options after it alone."""
    objective, _, options = arm.partition("+")
    return list(MARKS).index(objective), options


PHASES = {
    "waiting": PlotStyle("rgba(128,128,128,0.15)", "solid", "circle", ""),
    "evaluate": PlotStyle(YELLOW, "solid", "circle", ""),
    "learn": PlotStyle(BLUE, "solid", "square", "/"),
    "score": PlotStyle(PURPLE, "solid", "diamond", "x"),
}
"""Of what a role does with a window."""

_COLOURS = (INK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")


def numbered(number: int) -> PlotStyle:
    """The mark of the domain of this number; no two of the first 280 are alike."""
    return PlotStyle(
        _COLOURS[number % len(_COLOURS)],
        _DASHES[number % len(_DASHES)],
        _SYMBOLS[number % len(_SYMBOLS)],
        "",
    )
