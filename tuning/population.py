"""Population-based training (Jaderberg et al. 2017, arXiv 1711.09846): who takes whose place, and
with which settings it goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from exfm_ray.config.tune import STACKABLE, Distribution, Settings, Value
from tuning.space import Space

QUARTER = 4
FACTORS = (0.8, 1.25)
"""What a setting is multiplied by when it is explored."""


def exploit(scores: Sequence[float], rng: np.random.Generator) -> list[tuple[int, int]]:
    """(source, target) pairs: every member of the worst quarter, and every failed one, takes after
    a random one of the best quarter.

    `scores`: of each member, lower is better, infinite for a failed one. A quarter is rounded down,
    at least one. No pairs where all failed.
    """
    size = max(len(scores) // QUARTER, 1)
    order = sorted(range(len(scores)), key=lambda member: scores[member])
    best = [member for member in order[:size] if math.isfinite(scores[member])]
    if not best:
        return []
    replaced = [
        member
        for rank, member in enumerate(order)
        if rank >= len(order) - size or not math.isfinite(scores[member])
    ]
    return [(best[rng.integers(len(best))], member) for member in replaced]


def explore(
    settings: Settings,
    space: Space,
    rng: np.random.Generator,
) -> Settings:
    """The source's settings, each that may change within a block and has a range times 0.8 or 1.25,
    but not beyond the range's ends."""
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
    assert (
        isinstance(value, int | float)
        and isinstance(low, int | float)
        and isinstance(high, int | float)
    )
    changed = min(max(value * FACTORS[rng.integers(len(FACTORS))], low), high)
    return round(changed) if distribution.integer else changed
