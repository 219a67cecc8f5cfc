"""Many searches in one Ray Tune experiment: each student and arm has a search and an early stopping of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import optuna
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from exfm_ray.config import Config
from exfm_ray.files import digest
from exfm_ray.tune_config import TuneConfig
from tuning.results import Search, Trial
from tuning.space import Space
from tuning.trial import score

SCORE = "score"
FAILED = "failed"
"""Stands in the last report of a trial that failed: the error. Its process lives on, for a new one takes seconds to start."""

REDUCTION = 2
"""At each rung the worse half is stopped."""


class Searches(Searcher):  # type: ignore[misc]  # ray has no types
    """Asks every search in turn for its next trial, knows the trials that an earlier process has finished."""

    def __init__(self, config: Config, tune: TuneConfig, spaces: Mapping[Search, Space], finished: Sequence[Trial]) -> None:
        super().__init__(metric=SCORE, mode="min")
        done = {(trial.search, trial.number) for trial in finished}
        self._waiting = deque((s, n) for n in range(tune.trials) for s in spaces if (s, n) not in done)
        self._rounds = tune.score_windows[1] - tune.score_windows[0] + 1
        self._search_of: dict[str, OptunaSearch] = {}
        self._searches: dict[Search, OptunaSearch] = {}
        for search, space in spaces.items():
            earlier = [trial for trial in finished if trial.search == search]
            storage = optuna.storages.InMemoryStorage()
            study = optuna.create_study(storage=storage, study_name="sweep")
            study.add_trials([frozen(trial, space, tune) for trial in earlier])
            standing = space.standing(config)
            if standing and (search, 0) not in done:
                study.enqueue_trial(standing)
            seed = int(digest([config.seed, *search, len(earlier)])[:8], 16)
            sampler = optuna.samplers.TPESampler(seed=seed) if tune.search == "tpe" else optuna.samplers.RandomSampler(seed=seed)
            self._searches[search] = OptunaSearch(space.suggest, metric=SCORE, mode="min", sampler=sampler, study_name="sweep", storage=storage)

    @property
    def left(self) -> int:
        """Trials still to be asked for."""
        return len(self._waiting)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if not self._waiting:
            return Searcher.FINISHED
        search, number = self._waiting.popleft()
        self._search_of[trial_id] = self._searches[search]
        return {"student": search.student, "arm": search.arm, "number": number, "settings": self._searches[search].suggest(trial_id)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if FAILED not in result:
            self._search_of[trial_id].on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial that was stopped early ends without a value: its score is of fewer windows than the others'."""
        failed = error or result is None or FAILED in result
        whole = not failed and result is not None and result["training_iteration"] >= self._rounds
        self._search_of.pop(trial_id).on_trial_complete(trial_id, result if whole else None, failed)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from its own results file."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


def frozen(trial: Trial, space: Space, tune: TuneConfig) -> optuna.trial.FrozenTrial:
    """A finished trial as its search knows it."""
    states = {"complete": optuna.trial.TrialState.COMPLETE, "stopped": optuna.trial.TrialState.PRUNED, "failed": optuna.trial.TrialState.FAIL}
    return optuna.trial.create_trial(
        state=states[trial.state], value=trial.score if trial.state == "complete" else None,
        params=space.params(trial.settings), distributions=space.known(trial.settings),
        intermediate_values={i: score(figures, tune.calibration) for i, figures in enumerate(trial.curve, 1)},
    )  # fmt: skip


class Halving(FIFOScheduler):  # type: ignore[misc]
    """ASHA within each search: students and arms are not compared with each other. Knows the trials of earlier processes."""

    def __init__(self, tune: TuneConfig, searches: Iterable[Search], finished: Sequence[Trial]) -> None:
        super().__init__()
        rounds = tune.score_windows[1] - tune.score_windows[0] + 1
        self._of = {s: ASHAScheduler(metric=SCORE, mode="min", max_t=rounds, grace_period=1, reduction_factor=REDUCTION) for s in searches}
        for trial in finished:
            earlier = SimpleNamespace(trial_id=f"earlier_{trial.search}_{trial.number}")
            self._of[trial.search].on_trial_add(None, earlier)
            for i, figures in enumerate(trial.curve, 1):
                self._of[trial.search].on_trial_result(None, earlier, {"training_iteration": i, SCORE: score(figures, tune.calibration)})

    def _asha(self, trial: Any) -> ASHAScheduler:
        return self._of[Search(trial.config["student"], trial.config["arm"])]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._asha(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if FAILED in result:
            return str(FIFOScheduler.STOP)
        return str(self._asha(trial).on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if FAILED not in result:
            self._asha(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._asha(trial).on_trial_remove(tune_controller, trial)
