"""Elements of the studies' drawings: standalone SVG without a library."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple

from exfm_ray.storage.atomic import write_text

GRID = "#e4e4e4"
INK = "#333"


class Point(NamedTuple):
    """A place in pixels, from the top left."""

    x: float
    y: float


def write_svg(
    path: Path,
    width: float,
    height: float,
    elements: Iterable[str],
    font_size: int,
) -> None:
    """Write a drawing of this size in pixels, on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="{font_size}">'
    )
    background = f'<rect width="{width}" height="{height}" fill="white"/>'
    write_text(path, "\n".join([head, background, *elements, "</svg>"]) + "\n")


def line(
    start: Point,
    end: Point,
    color: str,
    width: float = 1.2,
) -> str:
    """Draw a straight line."""
    return (
        f'<line x1="{start.x:.1f}" y1="{start.y:.1f}" x2="{end.x:.1f}" y2="{end.y:.1f}" '
        f'stroke="{color}" stroke-width="{width}"/>'
    )


def dot(
    center: Point,
    radius: float,
    color: str,
) -> str:
    """Draw a filled circle."""
    return f'<circle cx="{center.x:.1f}" cy="{center.y:.1f}" r="{radius:g}" fill="{color}"/>'


def text(
    place: Point,
    content: str,
    style: str = "",
) -> str:
    """Write a line of text that begins at `place`, unless `style` has another anchor."""
    return (
        f'<text x="{place.x:.1f}" y="{place.y:.1f}" fill="{INK}" {style}>{escape(content)}</text>'
    )


class Scale(NamedTuple):
    """Maps [low, high] to pixels; values beyond are drawn at the edge."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        inside = min(max(value, self.low), self.high)
        fraction = (inside - self.low) / (self.high - self.low)
        return self.start + fraction * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values, 3 to 7 of them."""
        extent = self.high - self.low
        power = 10 ** math.floor(math.log10(extent))
        steps = (power / 5, power / 2, power, 2 * power)
        step = next(step for step in steps if extent / step <= 7)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step)
        return [number * step for number in range(first, last + 1)]
