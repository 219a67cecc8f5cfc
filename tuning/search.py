"""Many searches in one Ray Tune experiment: each student and arm has a search and an early stopping
of its own.

A trial of Tune is a block: {"student", "arm", "members": [{"number", "settings"}, ...]}, trials of
one student and arm whose settings differ in `STACKABLE` ones only. A report holds an entry for each
member, in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import optuna
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from exfm_ray.config.root import Config
from exfm_ray.config.tune import STACKABLE, Settings, TuneConfig
from exfm_ray.storage.atomic import short_hash
from tuning.results import Search, Trial
from tuning.space import Space
from tuning.trial import score

MEMBERS = "members"
SCORE = "score"
FAILED = "failed"
"""Stands in the entry of a member that failed: the error. The process lives on, for a new one takes
seconds to start."""

REDUCTION = 2
"""At each rung the worse half is stopped."""


class MultiSearch(Searcher):  # type: ignore[misc]  # ray has no types
    """Asks every search in turn for its next block, knows the trials that an earlier process has
    finished."""

    def __init__(
        self,
        config: Config,
        tune: TuneConfig,
        spaces: Mapping[Search, Space],
        finished: Sequence[Trial],
    ) -> None:
        super().__init__(metric=SCORE, mode="min")
        done = {(trial.search, trial.number) for trial in finished}
        self._spaces = spaces
        self._waiting = _blocks(
            tune, {s: [n for n in range(tune.trials) if (s, n) not in done] for s in spaces}
        )
        self._rounds = tune.validation_windows[1] - tune.validation_windows[0] + 1
        self._search_of: dict[str, OptunaSearch] = {}
        self._searches: dict[Search, OptunaSearch] = {}
        self._studies: dict[Search, optuna.Study] = {}
        for search, space in spaces.items():
            earlier = [trial for trial in finished if trial.search == search]
            storage = optuna.storages.InMemoryStorage()
            study = self._studies[search] = optuna.create_study(storage=storage, study_name="sweep")
            study.add_trials([to_frozen_trial(trial, space, tune) for trial in earlier])
            current_params = space.current_params(config)
            if current_params and (search, 0) not in done:
                study.enqueue_trial(current_params)
            sampler = _sampler(tune, int(short_hash([config.seed, *search, len(earlier)])[:8], 16))
            self._searches[search] = OptunaSearch(
                space.suggest,
                metric=SCORE,
                mode="min",
                sampler=sampler,
                study_name="sweep",
                storage=storage,
            )

    @property
    def left(self) -> int:
        """Blocks still to be asked for."""
        return len(self._waiting)

    def set_search_properties(
        self,
        metric: str | None,
        mode: str | None,
        config: dict[str, Any],
        **spec: Any,
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        """The first member is asked freely, and its siblings with its structure."""
        if not self._waiting:
            return Searcher.FINISHED
        search, numbers = self._waiting.popleft()
        settings: list[Settings] = []
        for i in range(len(numbers)):
            if settings:
                structure = {
                    name: value for name, value in settings[0].items() if name not in STACKABLE
                }
                self._studies[search].enqueue_trial(self._spaces[search].params(structure))
            self._search_of[member_id(trial_id, i)] = self._searches[search]
            settings.append(self._searches[search].suggest(member_id(trial_id, i)))
        members = [
            {"number": number, "settings": one}
            for number, one in zip(numbers, settings, strict=True)
        ]
        return {"student": search.student, "arm": search.arm, MEMBERS: members}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        for name, entry in _entries(trial_id, result):
            if FAILED not in entry:
                self._search_of[name].on_trial_result(name, entry)

    def on_trial_complete(
        self,
        trial_id: str,
        result: dict[str, Any] | None = None,
        error: bool = False,
    ) -> None:
        """Members of a block that was stopped early end without a value: their score is of fewer
        windows than the others'."""
        told = dict(_entries(trial_id, result)) if result and not error else {}
        for name in [name for name in self._search_of if name.rpartition("_")[0] == trial_id]:
            entry = told.get(name)
            failed = entry is None or FAILED in entry
            whole = not failed and entry is not None and entry["training_iteration"] >= self._rounds
            self._search_of.pop(name).on_trial_complete(name, entry if whole else None, failed)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from its own results file."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


def member_id(trial_id: str, position: int) -> str:
    """A member's name among all members of a search."""
    return f"{trial_id}_{position}"


def _blocks(
    tune: TuneConfig, missing: Mapping[Search, Sequence[int]]
) -> deque[tuple[Search, Sequence[int]]]:
    """The missing trials as blocks of `together` numbers, the searches in turn."""
    starts = range(0, tune.trials, tune.trials_per_process)
    return deque(
        (s, numbers[start : start + tune.trials_per_process])
        for start in starts
        for s, numbers in missing.items()
        if start < len(numbers)
    )


def _entries(trial_id: str, result: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(member's name, its entry as a report of its own) of a block's report."""
    return [
        (member_id(trial_id, i), {**entry, "training_iteration": result["training_iteration"]})
        for i, entry in enumerate(result[MEMBERS])
    ]


def _sampler(tune: TuneConfig, seed: int) -> optuna.samplers.BaseSampler:
    """Populations begin at random. TPE takes trials without an answer for poor ones, lest it asks
    for several alike."""
    return (
        optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        if tune.search == "tpe"
        else optuna.samplers.RandomSampler(seed=seed)
    )


def to_frozen_trial(
    trial: Trial,
    space: Space,
    tune: TuneConfig,
) -> optuna.trial.FrozenTrial:
    """A finished trial as its search knows it."""
    states = {
        "complete": optuna.trial.TrialState.COMPLETE,
        "stopped": optuna.trial.TrialState.PRUNED,
        "failed": optuna.trial.TrialState.FAIL,
    }
    return optuna.trial.create_trial(
        state=states[trial.state],
        value=trial.score if trial.state == "complete" else None,
        params=space.params(trial.settings),
        distributions=space.known(trial.settings),
        intermediate_values={
            i: score(figures, tune.calibration) for i, figures in enumerate(trial.curve, 1)
        },
    )


class PerSearchASHA(FIFOScheduler):  # type: ignore[misc]
    """ASHA within each search: students and arms are not compared with each other. Knows the trials
    of earlier processes.

    Every member of a block is compared on its own; only whole blocks can be stopped.
    """

    def __init__(
        self,
        tune: TuneConfig,
        searches: Iterable[Search],
        finished: Sequence[Trial],
    ) -> None:
        super().__init__()
        rounds = tune.validation_windows[1] - tune.validation_windows[0] + 1
        self._of = {
            s: ASHAScheduler(
                metric=SCORE, mode="min", max_t=rounds, grace_period=1, reduction_factor=REDUCTION
            )
            for s in searches
        }
        for trial in finished:
            earlier = SimpleNamespace(trial_id=f"earlier_{trial.search}_{trial.number}")
            self._of[trial.search].on_trial_add(None, earlier)
            for i, figures in enumerate(trial.curve, 1):
                self._of[trial.search].on_trial_result(
                    None,
                    earlier,
                    {"training_iteration": i, SCORE: score(figures, tune.calibration)},
                )

    def _asha(self, trial: Any) -> ASHAScheduler:
        return self._of[Search(trial.config["student"], trial.config["arm"])]

    def set_search_properties(
        self,
        metric: str | None,
        mode: str | None,
        **spec: Any,
    ) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        for i in range(len(trial.config[MEMBERS])):
            self._asha(trial).on_trial_add(
                tune_controller, SimpleNamespace(trial_id=member_id(trial.trial_id, i))
            )

    def on_trial_result(
        self,
        tune_controller: Any,
        trial: Any,
        result: dict[str, Any],
    ) -> str:
        """A block is stopped when each member that has not failed would be; all members come to a
        rung at once."""
        told = [
            self._asha(trial).on_trial_result(
                tune_controller, SimpleNamespace(trial_id=name), entry
            )
            for name, entry in _entries(trial.trial_id, result)
            if FAILED not in entry
        ]
        return str(
            FIFOScheduler.STOP
            if all(one == FIFOScheduler.STOP for one in told)
            else FIFOScheduler.CONTINUE
        )
