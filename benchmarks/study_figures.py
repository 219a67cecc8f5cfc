"""Figures of the study: means over seeds with 95 % t intervals, tables for the README, and what
they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.study_teachers import Column
from benchmarks.study_variants import Variant
from exfm_ray.metrics.gain import ne_gain, transfer_ratio
from tuning.analysis import Estimate, estimate
from tuning.trial import Figures

Outcomes = Mapping[tuple[str, int], Figures | str]
"""(variant, seed) -> its figures, or what went wrong."""

VERDICTS = ("helps", "hurts", "no difference seen")


def verdict(found: Estimate | None) -> str | None:
    """What the interval says; None without one."""
    if found is None or found.low is None or found.high is None:
        return None
    return VERDICTS[0] if found.low > 0 else VERDICTS[1] if found.high < 0 else VERDICTS[2]


def variant_figures(
    wanted: Sequence[Variant],
    outcomes: Outcomes,
    fm: Mapping[int, float],
) -> dict[str, dict[str, Any]]:
    """variant -> figures of one student; `fm`: seed -> NE of the base FM on the student's judged
    examples.

    Gains and ratios are of one seed each: over the labels arm of that seed and, as `difference`,
    the gain less that of the variant `against`. The transfer ratio is null for all where the FM's
    gain is within its spread over seeds, for there it says nothing.
    """
    done = {key: one for key, one in outcomes.items() if isinstance(one, Figures)}
    labels = {seed: one.ne for (name, seed), one in done.items() if name == "labels"}
    gains = {
        key: gain
        for key, one in done.items()
        if (gain := ne_gain(one.ne, labels.get(key[1]))) is not None and key[0] != "labels"
    }
    fm_gains = {
        seed: gain for seed, ne in fm.items() if (gain := ne_gain(ne, labels.get(seed))) is not None
    }
    telling = len(fm_gains) > 1 and np.mean(list(fm_gains.values())) > np.std(
        list(fm_gains.values()), ddof=1
    )
    told: dict[str, dict[str, Any]] = {}
    for variant in wanted:
        seeds = [seed for name, seed in outcomes if name == variant.name]
        ok = [seed for seed in seeds if (variant.name, seed) in done]
        own = {seed: gains[variant.name, seed] for seed in ok if (variant.name, seed) in gains}
        ratios = [
            transfer_ratio(gain, fm_gains[seed])
            for seed, gain in own.items()
            if telling and seed in fm_gains
        ]
        other = {
            seed: gains[variant.against, seed]
            for seed in own
            if variant.against and (variant.against, seed) in gains
        }
        values: dict[str, list[float]] = {
            "ne": [done[variant.name, seed].ne for seed in ok],
            "calibration": [done[variant.name, seed].calibration for seed in ok],
            "ne_gain": list(own.values()),
            "transfer_ratio": [ratio for ratio in ratios if ratio is not None],
            "difference": [own[seed] - gain for seed, gain in other.items()],
        }
        estimates = {key: estimate(of) for key, of in values.items()}
        told[variant.name] = {
            "family": variant.family,
            "arm": variant.arm,
            "teacher": variant.teacher,
            "supervised_from": variant.first,
            "against": variant.against,
            **{key: value._asdict() if value else None for key, value in estimates.items()},
            "over_labels": verdict(estimates["ne_gain"]),
            "over_against": verdict(estimates["difference"]),
            "errors": [outcomes[variant.name, seed] for seed in seeds if seed not in ok],
        }
    return told


def teacher_figures(
    judged: Mapping[Column, float],
    late: Mapping[Column, float],
    labels: Mapping[int, float],
) -> dict[str, dict[str, Any]]:
    """Teacher -> its own NE on the student's examples, and its gain over the student's labels arm
    of the same seed (judged windows).

    `late`: NE on the last of the judged windows, which all teachers supervise. Labels as a teacher
    are left out: their NE is 0.
    """
    told = {}
    for name in dict.fromkeys(name for _, name in late if name != "own_label"):
        mine = {seed: ne for (seed, other), ne in judged.items() if other == name}
        gains = [
            gain for seed, ne in mine.items() if (gain := ne_gain(ne, labels.get(seed))) is not None
        ]
        found = {
            "ne": list(mine.values()),
            "ne_gain": gains,
            "ne_late": [ne for (_, other), ne in late.items() if other == name],
        }
        told[name] = {
            key: value._asdict() if (value := estimate(of)) else None for key, of in found.items()
        }
    return told


def cell(
    value: Mapping[str, Any] | None,
    scale: float = 1.0,
    digits: int = 4,
    sign: str = "",
) -> str:
    """Mean and half the width of the interval."""
    if value is None:
        return ""
    text = f"{value['mean'] * scale:{sign}.{digits}f}"
    return (
        text
        if value["high"] is None
        else f"{text} ± {(value['high'] - value['mean']) * scale:.{digits}f}"
    )


def markdown(told: Mapping[str, Any]) -> str:
    """One data set: the table of its variants, that of its teachers, and what differs."""
    students = list(told["students"])
    first = told["students"][students[0]]["variants"]
    first_judged, last_judged = told["judged_windows"]
    heads = [f"{student}: NE gain % | TR | calibr." for student in students]
    lines = [
        f"\n**{told['title']}, windows {first_judged} to {last_judged}, {len(told['seeds'])} seeds**\n",
        f"| variant | {' | '.join(heads)} |",
    ]
    lines.append("|---" * (1 + 3 * len(students)) + "|")
    for name in first:
        cells = []
        for student in students:
            f = told["students"][student]["variants"][name]
            cells += [
                cell(f["ne_gain"], 100, 2, "+"),
                cell(f["transfer_ratio"], 1, 2),
                cell(f["calibration"], 1, 3),
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    late = told["late_windows"]
    headed = f" | NE, windows {late[0]} to {late[1]}"
    lines += [
        "\nThe teachers themselves, on the student's examples:\n",
        "| teacher | "
        + " | ".join(f"{student}: NE | NE gain %{headed}" for student in students)
        + " |",
        "|---" * (1 + 3 * len(students)) + "|",
    ]
    for name in told["students"][students[0]]["teachers"]:
        cells = []
        for student in students:
            t = told["students"][student]["teachers"].get(name, {})
            cells += [
                cell(t.get("ne")),
                cell(t.get("ne_gain"), 100, 2, "+"),
                cell(t.get("ne_late")),
            ]
        lines.append(
            f"| {'base FM, ' if name.startswith('lag') else ''}{name} | {' | '.join(cells)} |"
        )
    return "\n".join([*lines, "", *notes(told), "", *findings(told)])


def notes(told: Mapping[str, Any]) -> list[str]:
    """What the tables' figures are."""
    lags = [lag for lag in told["lags"] if lag > 1]
    sizes = ", ".join(f"{name} {flops / 1e6:.2f} MFLOP" for name, flops in told["fm_flops"].items())
    said = [
        f"lag {lag} from window {lag} on, so it shows in the figures of windows from {lag + 1} on"
        for lag in lags
    ]
    return [
        "Mean ± half of the 95 % t interval over seeds. NE gain: over the labels arm of the same seed. TR: transfer ratio, the gain over that of the "
        "base FM at lag 1 on the same examples; empty where the FM's gain is within its spread over seeds. A teacher's NE is empty where it does "
        "not supervise all of the windows.",
        "Teachers supervise from window 1 on; rows without a teacher are learnt from labels alone. Staleness: "
        f"{'; '.join(said) or 'the stream is too short'}. Each lag is compared with lag 1 that supervises from the same window on.",
        f"Forward pass of an example: {sizes}. The small and the large FM have the optimizer settings of the config's FM.",
    ]


def findings(told: Mapping[str, Any]) -> list[str]:
    """A line for each variant: what its intervals say for each student, over labels and against its
    reference."""
    students = told["students"]
    lines = [
        "What the intervals say (helps, hurts: the 95 % interval leaves 0 out; each interval stands for itself, so of 20 without a difference "
        "one is expected to leave it out):\n"
    ]
    for name, variant in next(iter(students.values()))["variants"].items():
        if name == "labels":
            continue
        parts = [f"over labels {_listed(name, 'over_labels', students)}"]
        if variant["against"]:
            parts.append(f"against {variant['against']} {_listed(name, 'over_against', students)}")
        failed = sum(len(student["variants"][name]["errors"]) for student in students.values())
        parts += [f"{failed} trainings failed"] if failed else []
        lines.append(f"- {name}: {'; '.join(parts)}.")
    return lines


def _listed(
    name: str,
    key: str,
    students: Mapping[str, Any],
) -> str:
    """The verdict, and on whom; one that holds for all students without their names."""
    whom = {
        word: [s for s, told in students.items() if told["variants"][name][key] == word]
        for word in VERDICTS
    }
    said = [
        f"{word} ({', '.join(names)})" if len(names) < len(students) else word
        for word, names in whom.items()
        if names
    ]
    return ", ".join(said) or "nothing: one seed has no interval"
