"""Draws NE against FLOPs per example, a line and points for each family, as a standalone SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from studies.svg import GRID, Point, Scale, dot, line, text, write_svg

WIDTH = 720
HEIGHT = 440
LEFT = 80
RIGHT = 130
TOP = 30
BOTTOM = 60
STROKE = 1.5
LABEL_HEIGHT = 36
BASE_LOG = math.log2(1e5)
"""Ticks of the FLOP axis are doublings of 0.1 MFLOP."""

COLORS = {"wukong": "#1b6ca8", "dcnv2": "#c4572a", "mlp": "#5a7d3a"}
TITLES = {"wukong": "Wukong", "dcnv2": "DCN-V2", "mlp": "MLP"}
MIDDLE = 'text-anchor="middle"'


class Axes(NamedTuple):
    """Scales of the drawing.

    Attributes:
        x: log2 of the FLOPs per example.
        y: NE.
    """

    x: Scale
    y: Scale


def draw(families: Mapping[str, Any], path: Path) -> None:
    """Draw the families to `path`. Dots are means over seeds, bars their range.

    Args:
        families: name -> sizes (each with flops, ne, ne_seeds), a and b of the fit.
    """
    sizes = [size for family in families.values() for size in family["sizes"]]
    axes = _axes(sizes)
    elements = [*_grid(axes), *_titles()]

    # Labels must not overlap: each is at the end of its line, or below the label before.
    right = axes.x.high
    by_end = sorted(families, key=lambda name: _fitted_ne(families[name], right), reverse=True)
    label_top = float(TOP)
    for name in by_end:
        family = families[name]
        last_log = math.log2(family["sizes"][-1]["flops"])
        label_top = max(label_top, axes.y.at(_fitted_ne(family, last_log)))
        elements += _family(family, axes, COLORS[name])
        elements.append(_label(name, family, label_top))
        label_top += LABEL_HEIGHT
    write_svg(path, WIDTH, HEIGHT, elements, font_size=13)


def _axes(sizes: list[Mapping[str, Any]]) -> Axes:
    logs = [math.log2(size["flops"]) for size in sizes]
    nes: list[float] = [ne for size in sizes for ne in size["ne_seeds"]]
    lowest = min(nes)
    highest = max(nes)
    margin = 0.06 * (highest - lowest)
    x = Scale(min(logs) - 0.2, max(logs) + 0.2, LEFT, WIDTH - RIGHT)
    y = Scale(lowest - margin, highest + margin, HEIGHT - BOTTOM, TOP)
    return Axes(x, y)


def _fitted_ne(family: Mapping[str, Any], log_flops: float) -> float:
    return float(family["a"] - family["b"] * log_flops)


def _grid(axes: Axes) -> Iterator[str]:
    first = math.ceil(axes.x.low - BASE_LOG)
    last = math.floor(axes.x.high - BASE_LOG)
    for doubling in range(first, last + 1):
        x = axes.x.at(BASE_LOG + doubling)
        yield line(Point(x, HEIGHT - BOTTOM), Point(x, TOP), GRID, STROKE)
        yield text(Point(x, HEIGHT - BOTTOM + 18), f"{0.1 * 2**doubling:g}", MIDDLE)

    step = 10 ** math.floor(math.log10(axes.y.high - axes.y.low)) / 2
    first = math.ceil(axes.y.low / step)
    last = math.floor(axes.y.high / step)
    for tick in range(first, last + 1):
        y = axes.y.at(tick * step)
        yield line(Point(LEFT, y), Point(WIDTH - RIGHT, y), GRID, STROKE)
        yield text(Point(LEFT - 28, y + 4), f"{tick * step:.3f}", MIDDLE)


def _titles() -> Iterator[str]:
    center = Point((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 16)
    yield text(center, "MFLOP of the forward pass per example", MIDDLE)
    y = (TOP + HEIGHT - BOTTOM) / 2
    title = text(Point(18, y), "NE of the click (lower is better)", MIDDLE)
    yield f'<g transform="rotate(-90 18 {y})">{title}</g>'


def _family(
    family: Mapping[str, Any],
    axes: Axes,
    color: str,
) -> Iterator[str]:
    """Draw the fitted line of a family and its sizes."""
    ends = []
    for size in (family["sizes"][0], family["sizes"][-1]):
        log_flops = math.log2(size["flops"])
        ends.append(Point(axes.x.at(log_flops), axes.y.at(_fitted_ne(family, log_flops))))
    start, end = ends
    yield line(start, end, color, STROKE)

    for size in family["sizes"]:
        x = axes.x.at(math.log2(size["flops"]))
        best = Point(x, axes.y.at(min(size["ne_seeds"])))
        worst = Point(x, axes.y.at(max(size["ne_seeds"])))
        yield line(best, worst, color, STROKE)
        yield dot(Point(x, axes.y.at(size["ne"])), 4, color)


def _label(
    name: str,
    family: Mapping[str, Any],
    y: float,
) -> str:
    x = WIDTH - RIGHT + 12
    slope = f'<tspan x="{x}" dy="15">{-family["b"]:+.4f} / doubling</tspan>'
    return f'<text x="{x}" y="{y:.1f}" fill="{COLORS[name]}">{TITLES[name]} {slope}</text>'
