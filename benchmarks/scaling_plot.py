"""Draws NE against FLOPs per example, a line and points for each family, as a standalone SVG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from exfm_ray.storage.atomic import write_text

WIDTH = 720
HEIGHT = 440
LEFT = 80
RIGHT = 130
TOP = 30
BOTTOM = 60
COLOURS = {"wukong": "#1b6ca8", "dcnv2": "#c4572a", "mlp": "#5a7d3a"}
TITLES = {"wukong": "Wukong", "dcnv2": "DCN-V2", "mlp": "MLP"}


def draw(families: dict[str, Any], path: Path) -> None:
    """`families`: name -> sizes (each with flops, ne, ne_seeds), a and b of the fit. Dots are means
    over seeds, bars their range."""
    sizes = [size for family in families.values() for size in family["sizes"]]
    logs = [math.log2(size["flops"]) for size in sizes]
    nes: list[float] = [ne for size in sizes for ne in size["ne_seeds"]]
    low = min(logs) - 0.2
    high = max(logs) + 0.2
    bottom = min(nes)
    top = max(nes)
    margin = 0.06 * (top - bottom)
    bottom = bottom - margin
    top = top + margin

    def x(log: float) -> float:
        return LEFT + (log - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(ne: float) -> float:
        return HEIGHT - BOTTOM - (ne - bottom) / (top - bottom) * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    base = math.log2(1e5)
    for doubling in range(math.ceil(low - base), math.floor(high - base) + 1):
        at = x(base + doubling)
        parts.append(
            _line(at, HEIGHT - BOTTOM, at, TOP, "#e4e4e4")
            + _text(at, HEIGHT - BOTTOM + 18, f"{0.1 * 2**doubling:g}")
        )
    step = 10 ** math.floor(math.log10(top - bottom)) / 2
    for tick in range(math.ceil(bottom / step), math.floor(top / step) + 1):
        at = y(tick * step)
        parts.append(
            _line(LEFT, at, WIDTH - RIGHT, at, "#e4e4e4")
            + _text(LEFT - 28, at + 4, f"{tick * step:.3f}")
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 16, "MFLOP of the forward pass per example")
    )
    parts.append(
        f'<g transform="rotate(-90 18 {middle})">{_text(18, middle, "NE of the click (lower is better)")}</g>'
    )
    free = float(
        TOP
    )  # labels must not overlap: each at the end of its line, or below the one before
    for name, family in sorted(
        families.items(), key=lambda item: -(item[1]["a"] - item[1]["b"] * high)
    ):
        ends = [math.log2(size["flops"]) for size in (family["sizes"][0], family["sizes"][-1])]
        heights = [y(family["a"] - family["b"] * end) for end in ends]
        parts.append(_line(x(ends[0]), heights[0], x(ends[1]), heights[1], COLOURS[name]))
        for size in family["sizes"]:
            at = x(math.log2(size["flops"]))
            parts.append(
                _line(at, y(min(size["ne_seeds"])), at, y(max(size["ne_seeds"])), COLOURS[name])
            )
            parts.append(
                f'<circle cx="{at:.1f}" cy="{y(size["ne"]):.1f}" r="4" fill="{COLOURS[name]}"/>'
            )
        free = max(heights[1], free)
        label = f'{TITLES[name]} <tspan x="{WIDTH - RIGHT + 12}" dy="15">{-family["b"]:+.4f} / doubling</tspan>'
        parts.append(
            f'<text x="{WIDTH - RIGHT + 12}" y="{free:.1f}" fill="{COLOURS[name]}">{label}</text>'
        )
        free += 36
    write_text(path, "\n".join([*parts, "</svg>"]) + "\n")


def _line(
    x_1: float,
    y_1: float,
    x_2: float,
    y_2: float,
    colour: str,
) -> str:
    return f'<line x1="{x_1:.1f}" y1="{y_1:.1f}" x2="{x_2:.1f}" y2="{y_2:.1f}" stroke="{colour}" stroke-width="1.5"/>'


def _text(
    x: float,
    y: float,
    content: str,
) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" fill="#333">{content}</text>'
