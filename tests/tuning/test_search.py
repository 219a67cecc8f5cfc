"""Several searches in one: each suggests, learns and stops by its own trials, old ones included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from exfm_ray.config.root import Config
from exfm_ray.config.tune import Distribution, TuneConfig
from tuning.results import Search, State, Trial
from tuning.search import FAILED, MEMBERS, SCORE, MultiSearch, PerSearchASHA
from tuning.space import Space
from tuning.trial import Figures

A = Search("a", "ah")
B = Search("b", "ah")
W = "distillation.ah.w"
MLP = "distillation.ah.mlp"
BETA = "distillation.ah.beta"
SPACES = {search: Space({W: Distribution(low=0.1, high=3.0)}) for search in (A, B)}
TUNE = TuneConfig(trials=4, score_windows=(3, 6), judge_windows=(7, 8))


def finished(
    search: Search,
    number: int,
    w: float,
    nes: list[float],
    state: State,
) -> Trial:
    curve = tuple(Figures(3 + i, ne, 1.0, 1000.0) for i, ne in enumerate(nes))
    return Trial(search, number, {W: w}, state, None if state == "failed" else nes[-1], curve, 1.0)


def report(number: int, *scores: float | None) -> dict[str, Any]:
    """A trial group's report; None for a failed member."""
    entries = [{FAILED: "NaN"} if score is None else {SCORE: score} for score in scores]
    return {"training_iteration": number, SCORE: 0.0, MEMBERS: entries}


def running(
    search: Search,
    name: str,
    members: int = 1,
) -> Any:
    return SimpleNamespace(
        trial_id=name,
        config={"student": search.student, "arm": search.arm, MEMBERS: [{}] * members},
    )


def studies(searches: MultiSearch) -> dict[Search, list[optuna.trial.FrozenTrial]]:
    return {key: one._ot_study.trials for key, one in searches._searches.items()}


def test_asks_in_turn_for_what_is_missing() -> None:
    """Wrong: a student gets all trials before another gets any, a finished trial is suggested
    again, or trial 0 is not the config."""
    searches = MultiSearch(
        Config(),
        TUNE,
        SPACES,
        [finished(A, 1, 0.5, [0.9], "stopped"), finished(B, 0, 2.0, [0.8] * 4, "complete")],
    )
    assert searches.left == 6
    suggested = [searches.suggest(str(i)) for i in range(6)]
    members = [(one["student"], member["number"]) for one in suggested for member in one[MEMBERS]]
    assert members == [("a", 0), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3)]
    assert suggested[0][MEMBERS][0]["settings"] == {W: 1.0} and suggested[1][MEMBERS][0][
        "settings"
    ] != {W: 1.0}
    assert searches.suggest("6") == "FINISHED"


def test_what_a_search_learns() -> None:
    """Wrong: the score of a stopped trial, of fewer windows, counts as one of all; a failed
    trial counts as good; or another student's trial counts."""
    searches = MultiSearch(Config(), TUNE, SPACES, [])
    for name in "0123":  # a, b, a, b
        searches.suggest(name)
    for i in range(1, 5):
        searches.on_trial_result("0", report(i, 0.9 - i / 100))
    searches.on_trial_complete("0", report(4, 0.86))
    searches.on_trial_result("1", report(1, 0.5))
    searches.on_trial_complete("1", report(1, 0.5))
    searches.on_trial_result("2", report(1, 0.7))
    searches.on_trial_result("2", report(2, None))
    searches.on_trial_complete("2", report(2, None))
    searches.on_trial_complete("3", error=True)  # its process died
    states = optuna.trial.TrialState
    learned = {
        key: [(trial.state, trial.value, trial.intermediate_values) for trial in trials]
        for key, trials in studies(searches).items()
    }
    assert learned[A] == [
        (states.COMPLETE, 0.86, pytest.approx({1: 0.89, 2: 0.88, 3: 0.87, 4: 0.86})),
        (states.FAIL, None, {1: 0.7}),
    ]
    assert learned[B] == [(states.PRUNED, 0.5, {1: 0.5}), (states.FAIL, None, {})]


def test_a_resumed_search_knows_what_an_undisturbed_one_knows() -> None:
    """Wrong: a resumed sweep searches from the beginning."""
    done = [
        finished(A, 0, 1.0, [0.9, 0.8, 0.7, 0.6], "complete"),
        finished(A, 1, 0.3, [0.95], "stopped"),
        finished(A, 2, 2.0, [], "failed"),
    ]
    known = studies(MultiSearch(Config(), TUNE, SPACES, done))
    states = optuna.trial.TrialState
    assert [(t.state, t.params[W]) for t in known[A]] == [
        (states.COMPLETE, 1.0),
        (states.PRUNED, 0.3),
        (states.FAIL, 2.0),
    ]
    assert known[A][0].value == 0.6 and known[A][1].intermediate_values == {1: 0.95}
    assert [t.state for t in known[B]] == [states.WAITING]  # the config as it stands


@pytest.mark.parametrize("resumed", [False, True])
def test_each_search_halves_alone(resumed: bool) -> None:
    """Wrong: a student is stopped because another one is easier, or early stopping starts over
    when a sweep is resumed."""
    earlier = finished(A, 0, 1.0, [0.80, 0.80], "stopped")
    asha = PerSearchASHA(TUNE, SPACES, [earlier] if resumed else [])
    if not resumed:
        first = running(A, "first")
        asha.on_trial_add(None, first)
        assert [asha.on_trial_result(None, first, report(i, 0.80)) for i in (1, 2)] == [
            "CONTINUE",
            "CONTINUE",
        ]
    worse = running(A, "worse")
    better = running(A, "better")
    other = running(B, "other")
    for trial in (worse, better, other):
        asha.on_trial_add(None, trial)
    assert asha.on_trial_result(None, worse, report(1, 0.81)) == "STOP"
    assert asha.on_trial_result(None, better, report(1, 0.79)) == "CONTINUE"
    assert asha.on_trial_result(None, other, report(1, 0.99)) == "CONTINUE"
    assert asha.on_trial_result(None, better, report(2, None)) == "STOP"


def test_trial_groups() -> None:
    """Wrong: members differ in structure, which one process cannot train, or in nothing; or a
    trial is suggested twice or never."""
    space = {
        MLP: Distribution(choice=((), (8,), (16,), (32,))),
        W: Distribution(low=0.1, high=3.0),
        "vm.batch_size": Distribution(low=16, high=999, integer=True, when={MLP: (8,)}),
        BETA: Distribution(choice=(1.0, 2.0, 3.0)),
    }
    tune = TUNE.model_copy(update={"trials": 30, "trials_per_process": 4})
    config = Config.model_validate(
        {"vm": {"batch_size": 64}, "distillation": {"ah": {"mlp": [8], "beta": 2}}}
    )
    searches = MultiSearch(
        config,
        tune,
        {A: Space(space)},
        [Trial(A, 5, {W: 1.0, MLP: (), BETA: 1.0}, "failed", None, (), 1.0)],
    )
    assert searches.left == 8
    suggested = [searches.suggest(str(i))[MEMBERS] for i in range(8)]
    assert [member["number"] for group in suggested for member in group] == [
        n for n in range(30) if n != 5
    ]
    assert [len(group) for group in suggested] == [4] * 7 + [1] and searches.suggest(
        "8"
    ) == "FINISHED"
    assert suggested[0][0]["settings"] == {MLP: (8,), W: 1.0, "vm.batch_size": 64, BETA: 2.0}
    structures = [
        {(member["settings"][MLP], member["settings"].get("vm.batch_size")) for member in group}
        for group in suggested
    ]
    assert all(len(one) == 1 for one in structures) and len(set.union(*structures)) > 3
    assert len({member["settings"][W] for group in suggested for member in group}) == 29
    assert (
        len(
            {member["settings"][BETA] for member in suggested[0]}
            | {member["settings"][BETA] for member in suggested[1]}
        )
        > 1
    )
    known = studies(searches)[
        A
    ]  # 29 suggested, one known before, none that was enqueued and not taken
    assert len(known) == 30 and all(
        trial.state != optuna.trial.TrialState.WAITING for trial in known
    )


def test_what_a_search_learns_of_a_trial_group() -> None:
    """Wrong: a search learns a sibling's score, or one failed member takes the others with it."""
    searches = MultiSearch(
        Config(), TUNE.model_copy(update={"trials_per_process": 3}), {A: SPACES[A]}, []
    )
    suggested = [searches.suggest(name)[MEMBERS] for name in ("x_1", "x_11")]
    searches.on_trial_result("x_1", report(1, 0.9, 0.7, 0.8))
    for i in range(2, 5):
        searches.on_trial_result("x_1", report(i, 0.9 - i / 100, None, 0.8 - i / 100))
    searches.on_trial_complete("x_1", report(4, 0.86, None, 0.76))
    searches.on_trial_complete("x_11", report(4, 0.6))
    states = optuna.trial.TrialState
    learned = [(trial.state, trial.params[W], trial.value) for trial in studies(searches)[A]]
    w = [member["settings"][W] for group in suggested for member in group]
    assert learned == [
        (states.COMPLETE, w[0], 0.86),
        (states.FAIL, w[1], None),
        (states.COMPLETE, w[2], 0.76),
        (states.COMPLETE, w[3], 0.6),
    ]
    assert studies(searches)[A][1].intermediate_values == {1: 0.7}


def test_a_trial_group_is_stopped_as_a_whole() -> None:
    """Wrong: a good member is stopped with a poor sibling, or a trial group continues although
    all its members are poor or failed."""
    asha = PerSearchASHA(TUNE, SPACES, [finished(A, 0, 1.0, [0.80], "stopped")])
    mixed = running(A, "mixed", 3)
    poor = running(A, "poor", 2)
    broken = running(A, "broken", 2)
    for group in (mixed, poor, broken):
        asha.on_trial_add(None, group)
    assert asha.on_trial_result(None, mixed, report(1, 0.95, None, 0.70)) == "CONTINUE"
    assert asha.on_trial_result(None, poor, report(1, 0.90, 0.91)) == "STOP"
    assert asha.on_trial_result(None, broken, report(1, None, 0.99)) == "STOP"
    assert (
        asha.on_trial_result(None, mixed, report(2, 0.95, None, 0.70)) == "CONTINUE"
    )  # first at this rung
    assert (
        asha.on_trial_result(None, mixed, report(4, 0.95, None, 0.70)) == "STOP"
    )  # the last window
