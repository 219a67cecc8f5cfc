"""Population-based training (Jaderberg et al. 2017, arXiv 1711.09846): exploit and explore."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from exfm_ray.config.tune import STACKABLE, Distribution, Settings, Value
from tuning.space import Space

QUARTER = 4
FACTORS = (0.8, 1.25)
"""Exploring multiplies a setting by one of these."""


def exploit(scores: Sequence[float], rng: np.random.Generator) -> list[tuple[int, int]]:
    """Choose which members copy which others.

    Every member of the worst quarter, and every failed one, copies a random member of the best
    quarter. A quarter is rounded down, but is at least one member.

    Args:
        scores: score of each member, lower is better; infinite for a failed one.

    Returns:
        (source, target) pairs; none where all members have failed.
    """
    members = range(len(scores))
    size = max(len(scores) // QUARTER, 1)
    ranking = sorted(members, key=lambda member: scores[member])
    best = [member for member in ranking[:size] if math.isfinite(scores[member])]
    if not best:
        return []

    pairs = []
    for rank, member in enumerate(ranking):
        is_worst = rank >= len(ranking) - size
        if is_worst or not math.isfinite(scores[member]):
            source = best[rng.integers(len(best))]
            pairs.append((source, member))
    return pairs


def explore(
    settings: Settings,
    space: Space,
    rng: np.random.Generator,
) -> Settings:
    """Change the source's settings at random.

    Each setting that has a range and may differ within a trial group is multiplied by 0.8 or 1.25
    and kept within its range. Choices and structure stay.
    """
    return {
        name: _explored(name, value, space.distributions[name], rng)
        for name, value in settings.items()
    }


def _explored(
    name: str,
    value: Value,
    distribution: Distribution,
    rng: np.random.Generator,
) -> Value:
    if name not in STACKABLE or distribution.choice:
        return value
    low, high = distribution.ends()
    assert isinstance(value, int | float)
    assert isinstance(low, int | float) and isinstance(high, int | float)
    factor = FACTORS[rng.integers(len(FACTORS))]
    changed = min(max(value * factor, low), high)
    return round(changed) if distribution.integer else changed
