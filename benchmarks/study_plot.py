"""Draws the study as a standalone SVG: a column a data set; gains with intervals per variant, below
them what lag and the FM's size change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from exfm_ray.storage.atomic import write_text

COLOURS = ("#1b6ca8", "#c4572a", "#5a7d3a", "#7b4b94")
GREY = "#e4e4e4"
INK = "#333"
COLUMN = 640
NAMES = 210
ROW = 26
TOP = 74
PANEL = 190
GAP = 64
MARGIN = 14
DASHES = {"ah": "", "ah_sa": ' stroke-dasharray="5 3"'}


class Scale(NamedTuple):
    """Maps [low, high] to pixels; what lies beyond is put at the edge."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values, 3 to 7 of them."""
        step = 10 ** math.floor(math.log10(self.high - self.low))
        step = next(
            s for s in (step / 5, step / 2, step, 2 * step) if (self.high - self.low) / s <= 7
        )
        return [
            number * step
            for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        ]


def draw(told: Mapping[str, Any], path: Path) -> None:
    """`told`: data set -> title, students -> variants -> figures. Gains in percent; intervals
    beyond the axis are cut at its edge."""
    heights = [_rows_height(one) for one in told.values()]
    width = COLUMN * len(told)
    height = TOP + max(heights) + 2 * PANEL + 2 * GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, one in enumerate(told.values()):
        parts += _column(one, COLUMN * number, max(heights))
    write_text(path, "\n".join([*parts, "</svg>"]) + "\n")


def _column(
    one: Mapping[str, Any],
    left: float,
    rows_height: float,
) -> Iterator[str]:
    """One data set."""
    colours = dict(zip(one["students"], COLOURS, strict=False))
    yield _text(
        left + MARGIN,
        22,
        one["title"] + ", windows {} to {}".format(*one["judged_windows"]),
        'font-size="15"',
    )
    yield _text(left + MARGIN, 40, "NE gain over labels, %; mean and 95 % interval over seeds")
    for number, (student, colour) in enumerate(colours.items()):
        yield f'<circle cx="{left + MARGIN + 5 + 90 * number}" cy="56" r="4" fill="{colour}"/>'
        yield _text(left + MARGIN + 14 + 90 * number, 60, student)
    yield from _variants(one, colours, left)
    below = TOP + rows_height + GAP / 2
    lags = [
        [(f"lag {lag}", f"{arm}, lag {lag}") for lag in one["lags"] if lag > 1] for arm in DASHES
    ]
    yield from _lines(
        one,
        colours,
        left,
        below,
        "NE gain less that at lag 1 from the same window on, %",
        "difference",
        lags,
    )
    sizes = [
        [("small", f"{arm}, small FM"), ("config's", arm), ("large", f"{arm}, large FM")]
        for arm in DASHES
    ]
    yield from _lines(
        one,
        colours,
        left,
        below + PANEL + GAP / 2,
        "NE gain over labels by size of the FM, %",
        "ne_gain",
        sizes,
    )


def _families(one: Mapping[str, Any]) -> dict[str, list[str]]:
    """Family -> its variants, without labels."""
    families: dict[str, list[str]] = {}
    for name, figures in next(iter(one["students"].values()))["variants"].items():
        if name != "labels":
            families.setdefault(figures["family"], []).append(name)
    return families


def _rows_height(one: Mapping[str, Any]) -> float:
    families = _families(one)
    return ROW * (len(families) + sum(map(len, families.values())))


def _gains(
    one: Mapping[str, Any],
    names: Sequence[str],
    key: str,
) -> list[Mapping[str, Any]]:
    """The gains or differences that there are."""
    return [
        gain
        for told in one["students"].values()
        for name in names
        if (gain := told["variants"][name][key])
    ]


def _range(gains: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Of the means, with 0 and a margin, in percent: a wide interval must not hide the differences
    between means."""
    means = [100 * gain["mean"] for gain in gains] + [0.0]
    margin = 0.15 * (max(means) - min(means)) or 0.1
    return min(means) - margin, max(means) + margin


def _variants(
    one: Mapping[str, Any],
    colours: Mapping[str, str],
    left: float,
) -> Iterator[str]:
    """A row a variant, a dot with its interval a student."""
    families = _families(one)
    scale = Scale(
        *_range(_gains(one, [name for names in families.values() for name in names], "ne_gain")),
        left + NAMES,
        left + COLUMN - MARGIN,
    )
    bottom = TOP + _rows_height(one)
    y = float(TOP)
    for tick in scale.ticks():
        yield _line(
            scale.at(tick), TOP, scale.at(tick), bottom, "#888" if abs(tick) < 1e-12 else GREY
        )
        yield _text(
            scale.at(tick),
            bottom + 14,
            f"{tick:+.3g}" if abs(tick) > 1e-12 else "0",
            'text-anchor="middle"',
        )
    for family, names in families.items():
        yield _text(left + MARGIN, y + ROW / 2 + 4, family, 'font-weight="bold"')
        y += ROW
        for name in names:
            yield _text(left + MARGIN, y + ROW / 2 + 4, name)
            for number, (student, colour) in enumerate(colours.items()):
                gain = one["students"][student]["variants"][name]["ne_gain"]
                at = y + ROW * (number + 1) / (len(colours) + 1)
                yield from (
                    _point(scale.at(100 * gain["mean"]), at, *_ends(scale, gain), at, at, colour)
                    if gain
                    else ()
                )
            y += ROW


def _lines(
    one: Mapping[str, Any],
    colours: Mapping[str, str],
    left: float,
    top: float,
    title: str,
    key: str,
    arms: Sequence[Sequence[tuple[str, str]]],
) -> Iterator[str]:
    """A line a student and arm through the `key` of its variants. `arms`: for each of `DASHES`
    (place on the axis, variant), in order."""
    gains = _gains(one, [name for places in arms for _, name in places], key)
    scale = Scale(*_range(gains), top + PANEL - 24, top + 24)
    start = left + NAMES / 2
    end = left + COLUMN - NAMES / 2
    yield _text(
        left + MARGIN,
        top + 10,
        title
        + "; "
        + ", ".join(f"{arm}: {'dashed' if dash else 'solid'}" for arm, dash in DASHES.items()),
    )
    for tick in scale.ticks():
        yield _line(start, scale.at(tick), end, scale.at(tick), GREY)
        yield _text(
            start - 6,
            scale.at(tick) + 4,
            f"{tick:+.3g}" if abs(tick) > 1e-12 else "0",
            'text-anchor="end"',
        )
    places = [place for place, _ in arms[0]]
    for number, place in enumerate(places):
        yield _text(
            start + (number + 0.5) * (end - start) / len(places),
            top + PANEL - 6,
            place,
            'text-anchor="middle"',
        )
    shift = (end - start) / len(places) / 12
    for line, (arm, student) in enumerate(
        (arm, student) for arm in range(len(arms)) for student in colours
    ):
        dash = list(DASHES.values())[arm]
        colour = colours[student]
        points = []
        for number, (_, name) in enumerate(arms[arm]):
            gain = one["students"][student]["variants"][name][key]
            if gain:
                x = (
                    start
                    + (number + 0.5) * (end - start) / len(places)
                    + (line - len(colours) + 0.5) * shift
                )
                points.append((x, scale.at(100 * gain["mean"])))
                yield from _point(*points[-1], x, x, *_ends(scale, gain), colour)
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.2"{dash}/>'


def _ends(scale: Scale, gain: Mapping[str, Any]) -> tuple[float, float]:
    """Where the interval ends; at the mean with one seed."""
    low, high = (gain["mean"] if gain[end] is None else gain[end] for end in ("low", "high"))
    return scale.at(100 * low), scale.at(100 * high)


def _point(
    x: float,
    y: float,
    x_1: float,
    x_2: float,
    y_1: float,
    y_2: float,
    colour: str,
) -> Iterator[str]:
    """A dot with its interval."""
    yield _line(x_1, y_1, x_2, y_2, colour)
    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'


def _line(
    x_1: float,
    y_1: float,
    x_2: float,
    y_2: float,
    colour: str,
) -> str:
    return f'<line x1="{x_1:.1f}" y1="{y_1:.1f}" x2="{x_2:.1f}" y2="{y_2:.1f}" stroke="{colour}" stroke-width="1.2"/>'


def _text(
    x: float,
    y: float,
    content: str,
    style: str = "",
) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{INK}" {style}>{escape(content)}</text>'
