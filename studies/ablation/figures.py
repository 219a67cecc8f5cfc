"""Figures of the ablation study: means over seeds with 95 % t intervals, and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exfm_ray.metrics.gain import ne_gain, transfer_ratio
from studies.ablation.teachers import Column
from studies.ablation.variants import Variant
from tuning.analysis import Estimate, estimate
from tuning.trial import Figures

Outcomes = Mapping[tuple[str, int], Figures | str]
"""(variant, seed) -> figures, or the error of the training."""

HELPS = "helps"
HURTS = "hurts"
NO_DIFFERENCE = "no difference seen"
VERDICTS = (HELPS, HURTS, NO_DIFFERENCE)


def verdict(interval: Estimate | None) -> str | None:
    """Return what the interval says, or None without an interval."""
    if interval is None or interval.low is None or interval.high is None:
        return None
    if interval.low > 0:
        return HELPS
    if interval.high < 0:
        return HURTS
    return NO_DIFFERENCE


def variant_figures(
    all_variants: Sequence[Variant],
    outcomes: Outcomes,
    fm_nes: Mapping[int, float],
) -> dict[str, dict[str, Any]]:
    """Compute the figures of one student's variants.

    Gains and ratios are of one seed each: over the labels arm of that seed and, as `difference`,
    the gain less that of the variant `against`. The transfer ratio is None for all variants where
    the FM's gain is within its spread over seeds, because it says nothing there.

    Args:
        fm_nes: seed -> NE of the base FM on the student's holdout examples.
    """
    done = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Figures)}
    labels_nes = {seed: figures.ne for (name, seed), figures in done.items() if name == "labels"}
    gains: dict[tuple[str, int], float] = {}
    for (name, seed), figures in done.items():
        gain = ne_gain(figures.ne, labels_nes.get(seed))
        if gain is not None and name != "labels":
            gains[name, seed] = gain
    fm_gains = _clear_fm_gains(fm_nes, labels_nes)

    figures_of = {}
    for variant in all_variants:
        seeds = [seed for name, seed in outcomes if name == variant.name]
        values = _variant_values(variant, seeds, done, gains, fm_gains)
        own_outcomes = [outcomes[variant.name, seed] for seed in seeds]
        figures_of[variant.name] = {
            "family": variant.family,
            "arm": variant.arm,
            "teacher": variant.teacher,
            "supervised_from": variant.first,
            "against": variant.against,
            **_estimates(values),
            "over_labels": verdict(estimate(values["ne_gain"])),
            "over_against": verdict(estimate(values["difference"])),
            "errors": [outcome for outcome in own_outcomes if isinstance(outcome, str)],
        }
    return figures_of


def _estimates(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any] | None]:
    """Figure -> the estimate of its values over the seeds, as a JSON object."""
    estimates: dict[str, dict[str, Any] | None] = {}
    for name, of_seeds in values.items():
        estimated = estimate(of_seeds)
        estimates[name] = estimated._asdict() if estimated else None
    return estimates


def _clear_fm_gains(
    fm_nes: Mapping[int, float], labels_nes: Mapping[int, float]
) -> dict[int, float]:
    """Seed -> NE gain of the FM; empty where the mean gain is within its spread over seeds."""
    gains = {}
    for seed, ne in fm_nes.items():
        gain = ne_gain(ne, labels_nes.get(seed))
        if gain is not None:
            gains[seed] = gain
    values = list(gains.values())
    if len(values) < 2 or not np.mean(values) > np.std(values, ddof=1):
        return {}
    return gains


def _variant_values(
    variant: Variant,
    seeds: Sequence[int],
    done: Mapping[tuple[str, int], Figures],
    gains: Mapping[tuple[str, int], float],
    fm_gains: Mapping[int, float],
) -> dict[str, list[float]]:
    """Figure -> its values over the seeds that have one."""
    nes = []
    calibrations = []
    variant_gains = []
    ratios = []
    differences = []
    for seed in seeds:
        figures = done.get((variant.name, seed))
        if figures is None:
            continue
        nes.append(figures.ne)
        calibrations.append(figures.calibration)
        gain = gains.get((variant.name, seed))
        if gain is None:
            continue
        variant_gains.append(gain)
        ratio = transfer_ratio(gain, fm_gains.get(seed))
        if ratio is not None:
            ratios.append(ratio)
        reference = gains.get((variant.against, seed)) if variant.against else None
        if reference is not None:
            differences.append(gain - reference)
    return {
        "ne": nes,
        "calibration": calibrations,
        "ne_gain": variant_gains,
        "transfer_ratio": ratios,
        "difference": differences,
    }


def teacher_figures(
    holdout_nes: Mapping[Column, float],
    late_nes: Mapping[Column, float],
    labels_nes: Mapping[int, float],
) -> dict[str, dict[str, Any]]:
    """Compute each teacher's own NE, and its gain over the student's labels arm of the same seed.

    Labels as a teacher are left out, because their NE is 0.

    Args:
        holdout_nes: NE on the student's examples in the holdout windows.
        late_nes: NE on the last of these windows, which all teachers supervise.
        labels_nes: seed -> NE of the student's labels arm.
    """
    names = dict.fromkeys(name for _, name in late_nes if name != "own_label")
    figures = {}
    for name in names:
        nes = {seed: ne for (seed, other), ne in holdout_nes.items() if other == name}
        gains = [ne_gain(ne, labels_nes.get(seed)) for seed, ne in nes.items()]
        values = {
            "ne": list(nes.values()),
            "ne_gain": [gain for gain in gains if gain is not None],
            "ne_late": [ne for (_, other), ne in late_nes.items() if other == name],
        }
        figures[name] = _estimates(values)
    return figures
