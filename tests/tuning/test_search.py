"""Several searches in one: each asks, learns and stops by its own trials, also by those of an earlier process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from exfm_ray.config import Config
from exfm_ray.tune_config import Distribution, TuneConfig
from tuning.results import Search, State, Trial
from tuning.search import FAILED, SCORE, Halving, Searches
from tuning.space import Space
from tuning.trial import Figures

A, B = Search("a", "ah"), Search("b", "ah")
W = "distillation.ah.w"
SPACES = {search: Space({W: Distribution(low=0.1, high=3.0)}) for search in (A, B)}
TUNE = TuneConfig(trials=4, score_windows=(3, 6), judge_windows=(7, 8))


def finished(search: Search, number: int, w: float, nes: list[float], state: State) -> Trial:
    curve = tuple(Figures(3 + i, ne, 1.0) for i, ne in enumerate(nes))
    return Trial(search, number, {W: w}, state, None if state == "failed" else nes[-1], curve, 1.0)


def report(number: int, score: float) -> dict[str, Any]:
    return {"training_iteration": number, SCORE: score}


def running(search: Search, name: str) -> Any:
    return SimpleNamespace(trial_id=name, config={"student": search.student, "arm": search.arm})


def studies(searches: Searches) -> dict[Search, list[optuna.trial.FrozenTrial]]:
    return {key: one._ot_study.trials for key, one in searches._searches.items()}


def test_asks_in_turn_for_what_is_missing() -> None:
    """Wrong: a student gets all trials before another gets any, a finished trial is asked for again, trial 0 is not the config."""
    searches = Searches(Config(), TUNE, SPACES, [finished(A, 1, 0.5, [0.9], "stopped"), finished(B, 0, 2.0, [0.8] * 4, "complete")])
    assert searches.left == 6
    asked = [searches.suggest(str(i)) for i in range(6)]
    assert [(one["student"], one["number"]) for one in asked] == [("a", 0), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3)]
    assert asked[0]["settings"] == {W: 1.0} and asked[1]["settings"] != {W: 1.0}
    assert searches.suggest("6") == "FINISHED"


def test_what_a_search_learns() -> None:
    """Wrong: the score of a stopped trial, of fewer windows, counts as one of all; or a failed trial as good; or another student's."""
    searches = Searches(Config(), TUNE, SPACES, [])
    for name in "0123":  # a, b, a, b
        searches.suggest(name)
    for i in range(1, 5):
        searches.on_trial_result("0", report(i, 0.9 - i / 100))
    searches.on_trial_complete("0", report(4, 0.86))
    searches.on_trial_result("1", report(1, 0.5))
    searches.on_trial_complete("1", report(1, 0.5))
    searches.on_trial_result("2", report(1, 0.7))
    searches.on_trial_result("2", {**report(2, float("inf")), FAILED: "NaN"})
    searches.on_trial_complete("2", {**report(2, float("inf")), FAILED: "NaN"})
    searches.on_trial_complete("3", error=True)  # its process died
    states = optuna.trial.TrialState
    told = {key: [(trial.state, trial.value, trial.intermediate_values) for trial in trials] for key, trials in studies(searches).items()}
    assert told[A] == [(states.COMPLETE, 0.86, pytest.approx({1: 0.89, 2: 0.88, 3: 0.87, 4: 0.86})), (states.FAIL, None, {1: 0.7})]
    assert told[B] == [(states.PRUNED, 0.5, {1: 0.5}), (states.FAIL, None, {})]


def test_a_resumed_search_knows_what_an_undisturbed_one_knows() -> None:
    """Wrong: a sweep that goes on searches from the beginning."""
    done = [finished(A, 0, 1.0, [0.9, 0.8, 0.7, 0.6], "complete"), finished(A, 1, 0.3, [0.95], "stopped"), finished(A, 2, 2.0, [], "failed")]
    known = studies(Searches(Config(), TUNE, SPACES, done))
    states = optuna.trial.TrialState
    assert [(t.state, t.params[W]) for t in known[A]] == [(states.COMPLETE, 1.0), (states.PRUNED, 0.3), (states.FAIL, 2.0)]
    assert known[A][0].value == 0.6 and known[A][1].intermediate_values == {1: 0.95}
    assert [t.state for t in known[B]] == [states.WAITING]  # the config as it stands


@pytest.mark.parametrize("resumed", [False, True])
def test_each_search_halves_alone(resumed: bool) -> None:
    """Wrong: a student is stopped because another one is easier, or early stopping starts anew when a sweep goes on."""
    earlier = finished(A, 0, 1.0, [0.80, 0.80], "stopped")
    halving = Halving(TUNE, SPACES, [earlier] if resumed else [])
    if not resumed:
        first = running(A, "first")
        halving.on_trial_add(None, first)
        assert [halving.on_trial_result(None, first, report(i, 0.80)) for i in (1, 2)] == ["CONTINUE", "CONTINUE"]
    worse, better, other = running(A, "worse"), running(A, "better"), running(B, "other")
    for trial in (worse, better, other):
        halving.on_trial_add(None, trial)
    assert halving.on_trial_result(None, worse, report(1, 0.81)) == "STOP"
    assert halving.on_trial_result(None, better, report(1, 0.79)) == "CONTINUE"
    assert halving.on_trial_result(None, other, report(1, 0.99)) == "CONTINUE"
    assert halving.on_trial_result(None, better, {**report(2, float("inf")), FAILED: "NaN"}) == "STOP"
