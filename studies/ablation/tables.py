"""Tables of the ablation study in Markdown, and sentences that say what they show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from studies.ablation.figures import VERDICTS

COMPARISON = (
    "What the intervals say (helps, hurts: the 95 % interval excludes 0; each interval stands "
    "alone, so of 20 variants without a difference one is expected to exclude it):\n"
)
LEGEND = (
    "Mean ± half of the 95 % t interval over seeds. NE gain: over the labels arm of the same seed. "
    "TR: transfer ratio, the gain over that of the base FM at lag 1 on the same examples; empty "
    "where the FM's gain is within its spread over seeds. A teacher's NE is empty where it does "
    "not supervise all of the windows."
)


def cell(
    value: Mapping[str, Any] | None,
    scale: float = 1.0,
    digits: int = 4,
    sign: str = "",
) -> str:
    """Format the mean and half the width of the interval."""
    if value is None:
        return ""
    mean = f"{value['mean'] * scale:{sign}.{digits}f}"
    if value["high"] is None:
        return mean
    half_width = (value["high"] - value["mean"]) * scale
    return f"{mean} ± {half_width:.{digits}f}"


def markdown(figures: Mapping[str, Any]) -> str:
    """Format one data set: the tables of its variants and teachers, and what they show."""
    lines = [
        *_variant_table(figures),
        "\nThe teachers themselves, on the student's examples:\n",
        *_teacher_table(figures),
        "",
        *notes(figures),
        "",
        *findings(figures),
    ]
    return "\n".join(lines)


def _variant_table(figures: Mapping[str, Any]) -> list[str]:
    students: Mapping[str, Any] = figures["students"]
    first, last = figures["judged_windows"]
    title = f"{figures['title']}, windows {first} to {last}, {len(figures['seeds'])} seeds"
    headings = [f"{student}: NE gain % | TR | calibr." for student in students]
    lines = [f"\n**{title}**\n", _row(["variant", *headings]), _rule(1 + 3 * len(students))]

    for name in next(iter(students.values()))["variants"]:
        cells = []
        for student in students.values():
            variant = student["variants"][name]
            cells.append(cell(variant["ne_gain"], 100, 2, "+"))
            cells.append(cell(variant["transfer_ratio"], 1, 2))
            cells.append(cell(variant["calibration"], 1, 3))
        lines.append(_row([name, *cells]))
    return lines


def _teacher_table(figures: Mapping[str, Any]) -> list[str]:
    students: Mapping[str, Any] = figures["students"]
    first, last = figures["late_windows"]
    late = f"NE, windows {first} to {last}"
    headings = [f"{student}: NE | NE gain % | {late}" for student in students]
    lines = [_row(["teacher", *headings]), _rule(1 + 3 * len(students))]

    for name in next(iter(students.values()))["teachers"]:
        cells = []
        for student in students.values():
            teacher = student["teachers"].get(name, {})
            cells.append(cell(teacher.get("ne")))
            cells.append(cell(teacher.get("ne_gain"), 100, 2, "+"))
            cells.append(cell(teacher.get("ne_late")))
        title = f"base FM, {name}" if name.startswith("lag") else name
        lines.append(_row([title, *cells]))
    return lines


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"


def notes(figures: Mapping[str, Any]) -> list[str]:
    """Explain the figures of the tables."""
    staleness = [
        f"lag {lag} from window {lag} on, so it shows in the figures of windows from {lag + 1} on"
        for lag in figures["lags"]
        if lag > 1
    ]
    sizes = [f"{name} {flops / 1e6:.2f} MFLOP" for name, flops in figures["fm_flops"].items()]
    return [
        LEGEND,
        "Teachers supervise from window 1 on; rows without a teacher are learned from labels "
        f"alone. Staleness: {'; '.join(staleness) or 'the stream is too short'}. Each lag is "
        "compared with lag 1 that supervises from the same window on.",
        f"Forward pass of an example: {', '.join(sizes)}. The small and the large FM have the "
        "optimizer settings of the config's FM.",
    ]


def findings(figures: Mapping[str, Any]) -> list[str]:
    """Say for each variant what its intervals show, over labels and against its reference."""
    students: Mapping[str, Any] = figures["students"]
    lines = [COMPARISON]
    for name, variant in next(iter(students.values()))["variants"].items():
        if name == "labels":
            continue
        parts = [f"over labels {_verdicts(name, 'over_labels', students)}"]
        if variant["against"]:
            over_reference = _verdicts(name, "over_against", students)
            parts.append(f"against {variant['against']} {over_reference}")
        failed = sum(len(student["variants"][name]["errors"]) for student in students.values())
        if failed:
            parts.append(f"{failed} trainings failed")
        lines.append(f"- {name}: {'; '.join(parts)}.")
    return lines


def _verdicts(
    variant: str,
    key: str,
    students: Mapping[str, Any],
) -> str:
    """Each verdict with the students it holds for; without names where it holds for all."""
    parts = []
    for verdict in VERDICTS:
        names = [
            name
            for name, student in students.items()
            if student["variants"][variant][key] == verdict
        ]
        if len(names) == len(students):
            parts.append(verdict)
        elif names:
            parts.append(f"{verdict} ({', '.join(names)})")
    return ", ".join(parts) or "nothing: one seed has no interval"
