"""Population-based training: which members copy which, and how settings change."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exfm_ray.config.tune import Distribution, Settings
from tuning.population import exploit, explore
from tuning.space import Space

SPACE = Space(
    {
        "distillation.kd.w": Distribution(low=0.1, high=4, log=True),
        "distillation.ah.w": Distribution(choice=(0.5, 1.0)),
        "vm.batch_size": Distribution(low=16, high=64, integer=True),
        "distillation.ah.mlp": Distribution(choice=((), (16,))),
    }
)


@given(
    scores=st.lists(st.one_of(st.floats(0, 3), st.just(math.inf)), min_size=4, max_size=24),
    seed=st.integers(0, 2**31),
)
def test_who_is_replaced(scores: list[float], seed: int) -> None:
    """Wrong: a good member is overwritten, a failed one is copied or stays failed, or a copy is
    copied."""
    moves = exploit(scores, np.random.default_rng(seed))
    quarter = len(scores) // 4
    failed = scores.count(math.inf)
    if failed == len(scores):
        assert moves == []
        return
    sources = {source for source, _ in moves}
    targets = [target for _, target in moves]
    assert len(set(targets)) == len(targets) == max(quarter, failed) and not sources & set(targets)
    surviving = [score for member, score in enumerate(scores) if member not in targets]
    assert min(scores[member] for member in targets) >= max(surviving)
    assert all(sum(score < scores[source] for score in scores) < quarter for source in sources)


def test_sources_are_drawn() -> None:
    """Wrong: the whole population descends from the best member, or the draw cannot be repeated."""
    scores = [float(number) for number in range(8)]
    drawn = [exploit(scores, np.random.default_rng(seed)) for seed in range(40)]
    assert {source for moves in drawn for source, _ in moves} == {0, 1} and drawn[3] == exploit(
        scores, np.random.default_rng(3)
    )
    assert [target for _, target in drawn[0]] == [6, 7]


def test_settings_that_are_explored() -> None:
    """Wrong: the structure of a model changes while it learns, or the factor is wrong or always
    the same."""
    settings: Settings = {
        "distillation.kd.w": 1.0,
        "distillation.ah.w": 0.5,
        "vm.batch_size": 32,
        "distillation.ah.mlp": (16,),
    }
    explored = [explore(settings, SPACE, np.random.default_rng(seed)) for seed in range(40)]
    assert {one["distillation.kd.w"] for one in explored} == {0.8, 1.25}
    assert all({**one, "distillation.kd.w": 1.0} == settings for one in explored) and list(
        explored[0]
    ) == list(settings)


@pytest.mark.parametrize(("value", "expected"), [(0.1, {0.1, 0.125}), (4.0, {3.2, 4.0})])
def test_settings_stay_in_their_space(value: float, expected: set[float]) -> None:
    """Wrong: a population leaves the space, and a resumed sweep cannot read its own results."""
    explored = {
        explore({"distillation.kd.w": value}, SPACE, np.random.default_rng(seed))[
            "distillation.kd.w"
        ]
        for seed in range(20)
    }
    assert explored == expected
