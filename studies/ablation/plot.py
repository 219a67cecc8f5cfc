"""Draws the ablation study as a standalone SVG with a column for each data set.

Top: gains with intervals, a row for each variant. Below: the effect of lag and of the FM's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.svg import GRID, Point, Scale, dot, line, text, write_svg

COLORS = ("#1b6ca8", "#c4572a", "#5a7d3a", "#7b4b94")
ZERO = "#888"
COLUMN = 640
NAMES = 210
ROW = 26
TOP = 74
PANEL = 190
GAP = 64
MARGIN = 14
DASHES = {"ah": "", "ah_sa": ' stroke-dasharray="5 3"'}

Places = Sequence[tuple[str, str]]
"""(label on the axis, variant) of each point of a line."""


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Draw the study to `path`. Gains are in percent; intervals are cut at the edge of the axis.

    Args:
        figures: data set -> figures, as `studies.ablation.run.study` returns them.
    """
    rows_height = max(_rows_height(dataset) for dataset in figures.values())
    width = COLUMN * len(figures)
    height = TOP + rows_height + 2 * PANEL + 2 * GAP
    elements: list[str] = []
    for number, dataset in enumerate(figures.values()):
        elements += _column(dataset, COLUMN * number, rows_height)
    write_svg(path, width, height, elements, font_size=12)


def _column(
    dataset: Mapping[str, Any],
    left: float,
    rows_height: float,
) -> Iterator[str]:
    """Draw one data set."""
    colors = dict(zip(dataset["students"], COLORS, strict=False))
    first, last = dataset["judged_windows"]
    title = f"{dataset['title']}, windows {first} to {last}"
    subtitle = "NE gain over labels, %; mean and 95 % interval over seeds"
    yield text(Point(left + MARGIN, 22), title, 'font-size="15"')
    yield text(Point(left + MARGIN, 40), subtitle)
    for number, (student, color) in enumerate(colors.items()):
        x = left + MARGIN + 90 * number
        yield dot(Point(x + 5, 56), 4, color)
        yield text(Point(x + 14, 60), student)
    yield from _variants(dataset, colors, left)

    top = TOP + rows_height + GAP / 2
    visible_lags = [lag for lag in dataset["lags"] if lag > 1]
    lags = [[(f"lag {lag}", f"{arm}, lag {lag}") for lag in visible_lags] for arm in DASHES]
    lag_title = "NE gain less that at lag 1 from the same window on, %"
    yield from _lines(dataset, colors, Point(left, top), lag_title, "difference", lags)

    top += PANEL + GAP / 2
    sizes = [
        [("small", f"{arm}, small FM"), ("config's", arm), ("large", f"{arm}, large FM")]
        for arm in DASHES
    ]
    size_title = "NE gain over labels by size of the FM, %"
    yield from _lines(dataset, colors, Point(left, top), size_title, "ne_gain", sizes)


def _families(dataset: Mapping[str, Any]) -> dict[str, list[str]]:
    """Family -> its variants, without labels."""
    first_student = next(iter(dataset["students"].values()))
    families: dict[str, list[str]] = {}
    for name, figures in first_student["variants"].items():
        if name != "labels":
            families.setdefault(figures["family"], []).append(name)
    return families


def _rows_height(dataset: Mapping[str, Any]) -> float:
    families = _families(dataset)
    rows = sum(1 + len(names) for names in families.values())
    return ROW * rows


def _gain_range(
    dataset: Mapping[str, Any],
    variants: Sequence[str],
    key: str,
) -> tuple[float, float]:
    """The range of the means, with 0 and a margin, in percent.

    A wide interval must not hide the differences between means.
    """
    means = [0.0]
    for student in dataset["students"].values():
        for name in variants:
            gain = student["variants"][name][key]
            if gain:
                means.append(100 * gain["mean"])
    low = min(means)
    high = max(means)
    margin = 0.15 * (high - low) or 0.1
    return low - margin, high + margin


def _variants(
    dataset: Mapping[str, Any],
    colors: Mapping[str, str],
    left: float,
) -> Iterator[str]:
    """Draw a row for each variant, with a dot and an interval for each student."""
    families = _families(dataset)
    names = [name for of_family in families.values() for name in of_family]
    low, high = _gain_range(dataset, names, "ne_gain")
    scale = Scale(low, high, left + NAMES, left + COLUMN - MARGIN)
    bottom = TOP + _rows_height(dataset)
    for tick in scale.ticks():
        x = scale.at(tick)
        yield line(Point(x, TOP), Point(x, bottom), ZERO if _is_zero(tick) else GRID)
        yield text(Point(x, bottom + 14), _tick_label(tick), 'text-anchor="middle"')

    y = float(TOP)
    for family, of_family in families.items():
        yield text(Point(left + MARGIN, y + ROW / 2 + 4), family, 'font-weight="bold"')
        y += ROW
        for name in of_family:
            yield text(Point(left + MARGIN, y + ROW / 2 + 4), name)
            yield from _variant_points(dataset, colors, scale, name, y)
            y += ROW


def _variant_points(
    dataset: Mapping[str, Any],
    colors: Mapping[str, str],
    scale: Scale,
    variant: str,
    top: float,
) -> Iterator[str]:
    """Draw the gain of one variant for each student, in a row from `top` on."""
    for number, (student, color) in enumerate(colors.items(), 1):
        gain = dataset["students"][student]["variants"][variant]["ne_gain"]
        if not gain:
            continue
        y = top + ROW * number / (len(colors) + 1)
        low, high = _interval(scale, gain)
        yield line(Point(low, y), Point(high, y), color)
        yield dot(Point(scale.at(100 * gain["mean"]), y), 3, color)


def _lines(
    dataset: Mapping[str, Any],
    colors: Mapping[str, str],
    corner: Point,
    title: str,
    key: str,
    arms: Sequence[Places],
) -> Iterator[str]:
    """Draw a line for each student and arm.

    Args:
        corner: the panel's top left corner.
        key: figure of a variant to draw.
        arms: the places of each arm of `DASHES`, in order.
    """
    left, top = corner
    names = [name for places in arms for _, name in places]
    low, high = _gain_range(dataset, names, key)
    y_scale = Scale(low, high, top + PANEL - 24, top + 24)
    start = left + NAMES / 2
    end = left + COLUMN - NAMES / 2
    styles = [f"{arm}: {'dashed' if dash else 'solid'}" for arm, dash in DASHES.items()]
    yield text(Point(left + MARGIN, top + 10), f"{title}; {', '.join(styles)}")
    for tick in y_scale.ticks():
        y = y_scale.at(tick)
        yield line(Point(start, y), Point(end, y), GRID)
        yield text(Point(start - 6, y + 4), _tick_label(tick), 'text-anchor="end"')

    labels = [label for label, _ in arms[0]]
    step = (end - start) / max(len(labels), 1)
    for number, label in enumerate(labels):
        center = start + (number + 0.5) * step
        yield text(Point(center, top + PANEL - 6), label, 'text-anchor="middle"')

    # Lines of different students and arms are shifted, so that their intervals do not overlap.
    shift = (0.5 - len(colors)) * step / 12
    for places, dash in zip(arms, DASHES.values(), strict=True):
        for student, color in colors.items():
            variants = dataset["students"][student]["variants"]
            gains = [variants[name][key] for _, name in places]
            yield from _line_of_gains(gains, y_scale, start + shift, step, color, dash)
            shift += step / 12


def _line_of_gains(
    gains: Sequence[Mapping[str, Any] | None],
    y_scale: Scale,
    start: float,
    step: float,
    color: str,
    dash: str,
) -> Iterator[str]:
    """Draw a line through gains, `step` pixels apart, with their intervals."""
    points = []
    for number, gain in enumerate(gains):
        if not gain:
            continue
        x = start + (number + 0.5) * step
        low, high = _interval(y_scale, gain)
        points.append(Point(x, y_scale.at(100 * gain["mean"])))
        yield line(Point(x, low), Point(x, high), color)
        yield dot(points[-1], 3, color)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.2"{dash}/>'


def _interval(scale: Scale, gain: Mapping[str, Any]) -> tuple[float, float]:
    """The pixels at which an interval ends; both at the mean with one seed."""
    low = gain["mean"] if gain["low"] is None else gain["low"]
    high = gain["mean"] if gain["high"] is None else gain["high"]
    return scale.at(100 * low), scale.at(100 * high)


def _is_zero(tick: float) -> bool:
    return abs(tick) <= 1e-12


def _tick_label(tick: float) -> str:
    return "0" if _is_zero(tick) else f"{tick:+.3g}"
