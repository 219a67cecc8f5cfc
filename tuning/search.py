"""Many searches in one Ray Tune experiment: each student and arm has its own search and ASHA.

A trial of Tune is a trial group: {"student", "arm", "members": [{"number", "settings"}, ...]}.
Its members are trials of one student and arm whose settings differ only in `STACKABLE` ones.
A report holds an entry for each member, in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
"""Key of the error in the entry of a failed member.

The process lives on, because a new one takes seconds to start.
"""

REDUCTION = 2
"""At each rung the worse half is stopped."""

STUDY_NAME = "sweep"
OPTUNA_STATES = {
    "complete": optuna.trial.TrialState.COMPLETE,
    "stopped": optuna.trial.TrialState.PRUNED,
    "failed": optuna.trial.TrialState.FAIL,
}


class MultiSearch(Searcher):  # type: ignore[misc]  # ray has no types
    """Asks the searches in turn for their next trial group.

    Knows the trials that an earlier process has finished.
    """

    def __init__(
        self,
        config: Config,
        tune: TuneConfig,
        spaces: Mapping[Search, Space],
        finished: Sequence[Trial],
    ) -> None:
        super().__init__(metric=SCORE, mode="min")
        self._spaces = spaces
        self._waiting = _trial_groups(tune, _missing_numbers(tune, spaces, finished))
        self._validation_windows = _validation_windows(tune)
        self._search_of_member: dict[str, OptunaSearch] = {}
        self._searches: dict[Search, OptunaSearch] = {}
        self._studies: dict[Search, optuna.Study] = {}
        for search in spaces:
            own_trials = [trial for trial in finished if trial.search == search]
            self._open_search(search, config, tune, own_trials)

    def _open_search(
        self,
        search: Search,
        config: Config,
        tune: TuneConfig,
        finished: Sequence[Trial],
    ) -> None:
        """Create the study of one search, with its finished trials.

        The config's own settings are drawn first, unless trial 0 is finished.
        """
        space = self._spaces[search]
        storage = optuna.storages.InMemoryStorage()
        study = optuna.create_study(storage=storage, study_name=STUDY_NAME)
        study.add_trials([to_frozen_trial(trial, space, tune) for trial in finished])
        current_params = space.current_params(config)
        is_first_finished = any(trial.number == 0 for trial in finished)
        if current_params and not is_first_finished:
            study.enqueue_trial(current_params)

        seed = int(short_hash([config.seed, *search, len(finished)])[:8], 16)
        self._studies[search] = study
        self._searches[search] = OptunaSearch(
            space.suggest,
            metric=SCORE,
            mode="min",
            sampler=_sampler(tune, seed),
            study_name=STUDY_NAME,
            storage=storage,
        )

    @property
    def left(self) -> int:
        """Number of trial groups that are still to be suggested."""
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
        """Suggest a trial group. The first member is free, the others share its structure."""
        if not self._waiting:
            return Searcher.FINISHED
        search, numbers = self._waiting.popleft()
        members: list[dict[str, Any]] = []
        for position, number in enumerate(numbers):
            if members:
                self._enqueue_structure(search, members[0]["settings"])
            name = member_id(trial_id, position)
            self._search_of_member[name] = self._searches[search]
            settings = self._searches[search].suggest(name)
            members.append({"number": number, "settings": settings})
        return {"student": search.student, "arm": search.arm, MEMBERS: members}

    def _enqueue_structure(self, search: Search, settings: Settings) -> None:
        """Make the next trial of a search take the structure of these settings."""
        structure = {name: value for name, value in settings.items() if name not in STACKABLE}
        params = self._spaces[search].params(structure)
        self._studies[search].enqueue_trial(params)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        for name, entry in _entries(trial_id, result):
            if FAILED not in entry:
                self._search_of_member[name].on_trial_result(name, entry)

    def on_trial_complete(
        self,
        trial_id: str,
        result: dict[str, Any] | None = None,
        error: bool = False,
    ) -> None:
        """End the members of a trial group.

        Members of a group that was stopped early end without a value, because their score is of
        fewer windows than that of others.
        """
        entries = dict(_entries(trial_id, result)) if result and not error else {}
        names = [name for name in self._search_of_member if name.rpartition("_")[0] == trial_id]
        for name in names:
            entry = entries.get(name)
            search = self._search_of_member.pop(name)
            if entry is None or FAILED in entry:
                search.on_trial_complete(name, None, True)
                continue
            is_complete = entry["training_iteration"] >= self._validation_windows
            search.on_trial_complete(name, entry if is_complete else None, False)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a sweep resumes from its own results file."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


def member_id(trial_id: str, position: int) -> str:
    """Return the name of a trial group's member, unique within a search."""
    return f"{trial_id}_{position}"


def _validation_windows(tune: TuneConfig) -> int:
    first, last = tune.validation_windows
    return last - first + 1


def _missing_numbers(
    tune: TuneConfig,
    searches: Iterable[Search],
    finished: Sequence[Trial],
) -> dict[Search, list[int]]:
    """Search -> numbers of its trials that are not finished."""
    done = {(trial.search, trial.number) for trial in finished}
    return {
        search: [number for number in range(tune.trials) if (search, number) not in done]
        for search in searches
    }


def _trial_groups(
    tune: TuneConfig, missing: Mapping[Search, Sequence[int]]
) -> deque[tuple[Search, Sequence[int]]]:
    """Divide the missing trials into groups, the searches in turn."""
    size = tune.trials_per_process
    groups: deque[tuple[Search, Sequence[int]]] = deque()
    for start in range(0, tune.trials, size):
        for search, numbers in missing.items():
            if start < len(numbers):
                groups.append((search, numbers[start : start + size]))
    return groups


def _entries(trial_id: str, result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each member's name and its entry of a trial group's report, as a report of its own."""
    iteration = result["training_iteration"]
    for position, entry in enumerate(result[MEMBERS]):
        yield member_id(trial_id, position), {**entry, "training_iteration": iteration}


def _sampler(tune: TuneConfig, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of a search. Populations begin at random.

    TPE counts unfinished trials as poor ones, so that it does not suggest several alike.
    """
    if tune.search == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def to_frozen_trial(
    trial: Trial,
    space: Space,
    tune: TuneConfig,
) -> optuna.trial.FrozenTrial:
    """Convert a finished trial to Optuna's form."""
    scores = {
        iteration: score(figures, tune.calibration)
        for iteration, figures in enumerate(trial.curve, 1)
    }
    return optuna.trial.create_trial(
        state=OPTUNA_STATES[trial.state],
        value=trial.score if trial.state == "complete" else None,
        params=space.params(trial.settings),
        distributions=space.known(trial.settings),
        intermediate_values=scores,
    )


class PerSearchASHA(FIFOScheduler):  # type: ignore[misc]
    """ASHA within each search: students and arms are not compared with each other.

    Every member of a trial group is compared on its own, but only whole groups can be stopped.
    Knows the trials of earlier processes.
    """

    def __init__(
        self,
        tune: TuneConfig,
        searches: Iterable[Search],
        finished: Sequence[Trial],
    ) -> None:
        super().__init__()
        self._schedulers = {
            search: ASHAScheduler(
                metric=SCORE,
                mode="min",
                max_t=_validation_windows(tune),
                grace_period=1,
                reduction_factor=REDUCTION,
            )
            for search in searches
        }
        for trial in finished:
            scheduler = self._schedulers[trial.search]
            earlier = SimpleNamespace(trial_id=f"earlier_{trial.search}_{trial.number}")
            scheduler.on_trial_add(None, earlier)
            for iteration, figures in enumerate(trial.curve, 1):
                entry = {"training_iteration": iteration, SCORE: score(figures, tune.calibration)}
                scheduler.on_trial_result(None, earlier, entry)

    def _scheduler_of(self, trial: Any) -> ASHAScheduler:
        return self._schedulers[Search(trial.config["student"], trial.config["arm"])]

    def set_search_properties(
        self,
        metric: str | None,
        mode: str | None,
        **spec: Any,
    ) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        scheduler = self._scheduler_of(trial)
        for position in range(len(trial.config[MEMBERS])):
            member = SimpleNamespace(trial_id=member_id(trial.trial_id, position))
            scheduler.on_trial_add(tune_controller, member)

    def on_trial_result(
        self,
        tune_controller: Any,
        trial: Any,
        result: dict[str, Any],
    ) -> str:
        """Stop a trial group when each member that has not failed would be stopped.

        All members reach a rung at the same time.
        """
        scheduler = self._scheduler_of(trial)
        decisions = []
        for name, entry in _entries(trial.trial_id, result):
            if FAILED not in entry:
                member = SimpleNamespace(trial_id=name)
                decisions.append(scheduler.on_trial_result(tune_controller, member, entry))
        stops = all(decision == FIFOScheduler.STOP for decision in decisions)
        return str(FIFOScheduler.STOP if stops else FIFOScheduler.CONTINUE)
