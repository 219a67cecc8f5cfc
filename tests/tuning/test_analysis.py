"""Analysis: confidence intervals, gains, the best trial, importance, the best config."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from exfm_ray.config.root import Config
from exfm_ray.config.tune import Distribution, TuneConfig
from tuning.analysis import arm_figures, best_config, estimate, importance
from tuning.holdout import HoldoutResult, best_trial
from tuning.results import Search, State, Trial
from tuning.space import Space
from tuning.trial import Figures

TUNE = TuneConfig(score_windows=(3, 4), judge_windows=(5, 6))


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12))
def test_confidence_interval(values: list[float]) -> None:
    """Wrong: the interval is too narrow (normal instead of t, population spread), so chance
    passes for a gain."""
    interval = estimate(values)
    assert interval is not None and interval.low is not None
    assert interval.seeds == len(values)
    low, high = (
        scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        if np.ptp(values)
        else (values[0], values[0])
    )
    np.testing.assert_allclose(
        [interval.mean, interval.low, interval.high],
        [np.mean(values), low, high],
        rtol=1e-7,
        atol=1e-9,
    )


def test_confidence_interval_by_hand() -> None:
    """Wrong: as above. t of 2 degrees of freedom at 97.5 % is 4.302653, the standard error of 1,
    2, 3 is 1 / sqrt 3."""
    interval = estimate([1.0, 2.0, 3.0])
    assert interval is not None and interval.high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-6)
    assert estimate([]) is None and estimate([0.5]) == (0.5, None, None, 1)


def results(arm: str, nes: list[float | None]) -> list[HoldoutResult]:
    return [
        HoldoutResult(
            "s", arm, "tuned", seed, {}, ne, None if ne is None else 1.0, None if ne else "diverged"
        )
        for seed, ne in enumerate(nes)
    ]


def test_gains_are_of_the_same_seed() -> None:
    """Wrong: an arm is compared with the labels arm of another seed, or a failed training
    counts."""
    figures = arm_figures(results("ah", [0.72, 0.54, None]), {0: 0.8, 1: 0.6, 2: 0.7}, 0.5)
    assert figures["ne_gain"]["mean"] == pytest.approx(0.1) and figures["ne_gain"][
        "high"
    ] == pytest.approx(0.1)
    assert figures["failed"] == 1 and figures["ne"]["seeds"] == 2
    ratios = [0.1 / ((0.8 - 0.5) / 0.8), 0.1 / ((0.6 - 0.5) / 0.6)]
    assert figures["transfer_ratio"]["mean"] == pytest.approx(np.mean(ratios))


@pytest.mark.parametrize("fm", [0.7, 0.705, None])
def test_no_transfer_ratio_without_a_gain_of_the_fm(fm: float | None) -> None:
    """Wrong: a ratio is reported although the FM gains nothing, or less than its spread over
    seeds."""
    assert (
        arm_figures(results("ah", [0.69, 0.69, 0.69]), {0: 0.69, 1: 0.70, 2: 0.72}, fm)[
            "transfer_ratio"
        ]
        is None
    )


def finished(
    number: int,
    ne: float,
    state: State = "complete",
    w: float = 1.0,
    beta: float = 1.0,
) -> Trial:
    settings = {"distillation.ah.w": w, "distillation.ah.beta": beta}
    return Trial(
        Search("s", "ah"),
        number,
        dict(settings),
        state,
        None if state == "failed" else ne,
        (Figures(4, ne, 1.0, 500.0),),
        1.0,
    )


def test_best_is_complete() -> None:
    """Wrong: a trial that was stopped early wins by its score on fewer windows."""
    trials = [
        finished(0, 0.8),
        finished(1, 0.6, "stopped"),
        finished(2, 0.5, "failed"),
        finished(3, 0.7),
    ]
    assert best_trial(trials, Search("s", "ah")) is trials[3]
    assert (
        best_trial(trials, Search("s", "kd")) is None
        and best_trial(trials[1:3], Search("s", "ah")) is None
    )


def test_importance() -> None:
    """Wrong: the setting that decides is not found, or stopped trials, whose NE is of other
    windows, count."""
    space = Space(
        {
            name: Distribution(low=0, high=1)
            for name in ("distillation.ah.w", "distillation.ah.beta")
        }
    )
    rng = np.random.default_rng(1)
    drawn = rng.random((40, 2))
    trials = [finished(i, 0.8 + w**2, w=w, beta=beta) for i, (w, beta) in enumerate(drawn)]
    trials += [finished(40 + i, beta - 9, "stopped", w, beta) for i, (w, beta) in enumerate(drawn)]
    importances = importance(trials, space, TUNE)
    assert importances["distillation.ah.w"] > 0.8 and sum(importances.values()) == pytest.approx(1)
    assert importance(trials[:1], space, TUNE) == {}


def test_best_config() -> None:
    """Wrong: the config trains another student, arm or setting than the one that won."""
    models = [{"name": name, "domain": name, "task": "click"} for name in ("a", "b")]
    config = Config.model_validate(
        {
            "name": "n",
            "vm": {"models": models},
            "tune": {"validation_windows": [1, 2], "holdout_windows": [3, 4]},
        }
    )
    best = best_config(
        config,
        config.vm.models[1],
        "ah",
        {"distillation.ah.mlp": (8,), "vm.optimizer.table_lr": 0.3},
    )
    assert (
        best.vm.models == (config.vm.models[1],)
        and best.vm.arms == ("labels", "ah")
        and best.tune is None
        and best.name == "n-best-b"
    )
    assert (best.distillation.ah.mlp, best.vm.optimizer.table_lr, best.fm) == ((8,), 0.3, config.fm)
