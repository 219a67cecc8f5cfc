"""How arms, phases and domains look: each differs by dash, symbol or pattern as well as by colour."""

from __future__ import annotations

from typing import NamedTuple


class Mark(NamedTuple):
    """A colour and what tells it from the others without colour, in plotly's words."""

    colour: str
    dash: str
    symbol: str
    pattern: str


# Okabe and Ito's colours, told apart without colour vision by lightness.
INK, ORANGE, SKY, GREEN, VERMILION, BLUE, YELLOW, PURPLE = "#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#F0E442", "#CC79A7"

MARKS = {
    "fm": Mark(INK, "solid", "star", ""),
    "labels": Mark(ORANGE, "dash", "circle", ""),
    "kd": Mark(SKY, "dot", "square", "/"),
    "ah": Mark(GREEN, "longdashdot", "diamond", "x"),
    "ah_sa": Mark(VERMILION, "dashdot", "triangle-up", "."),
}
"""Of the FM and of the arms, in the order in which they are listed everywhere."""

PHASES = {
    "waiting": Mark("rgba(128,128,128,0.15)", "solid", "circle", ""),
    "evaluate": Mark(YELLOW, "solid", "circle", ""),
    "learn": Mark(BLUE, "solid", "square", "/"),
    "score": Mark(PURPLE, "solid", "diamond", "x"),
}
"""Of what a role does with a window."""

_COLOURS = (INK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")


def numbered(number: int) -> Mark:
    """The mark of the domain of this number; no two of the first 280 are alike."""
    return Mark(_COLOURS[number % len(_COLOURS)], _DASHES[number % len(_DASHES)], _SYMBOLS[number % len(_SYMBOLS)], "")
