"""The process of a trial group: one trial of Ray Tune, whose members learn together.

The members are trials of one student and arm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ray import tune as ray_tune

from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.config.tune import Settings
from exfm_ray.data.readers import FragmentReader
from exfm_ray.runtime.actors import get_with_timeout
from exfm_ray.storage.atomic import short_hash
from tuning.population import exploit, explore
from tuning.search import FAILED, MEMBERS, SCORE
from tuning.space import Space, as_settings
from tuning.trial import Exploit, Figures, Outcome, learn, score, trial_job

Entry = dict[str, Any]
"""Report on a member: its figures, its score and the settings behind them; or its error."""


def run_trial_group(
    suggestion: dict[str, Any],
    config: Config,
    students: Mapping[str, StudentConfig],
    rows: Mapping[str, Any],
) -> None:
    """Report an entry for each member after each validation window, until all have failed.

    Args:
        suggestion: student, arm and members, as `MultiSearch.suggest` returns them.
        rows: student -> reference of its `StudentRows`.
    """
    try:
        student = students[suggestion["student"]]
        reader = get_with_timeout(rows[student.name], f"a trial of {student.name}", "its rows")
        for entries in train_members(suggestion, config, student, reader):
            best_score = min(entry.get(SCORE, math.inf) for entry in entries)
            ray_tune.report({MEMBERS: entries, SCORE: best_score})
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        failed = [{FAILED: message} for _ in suggestion[MEMBERS]]
        ray_tune.report({MEMBERS: failed, SCORE: math.inf})


def train_members(
    suggestion: Mapping[str, Any],
    config: Config,
    student: StudentConfig,
    reader: FragmentReader,
) -> Iterator[list[Entry]]:
    """Train the members, each with all seeds.

    Yields their entries after each validation window, and when all have failed.
    """
    tune = config.tune
    assert tune is not None
    arm = suggestion["arm"]
    first, last = tune.validation_windows
    windows = range(last + 1)
    seeds = range(config.seed, config.seed + tune.seeds)
    members = [as_settings(member["settings"]) for member in suggestion[MEMBERS]]
    jobs = [
        trial_job(config, student, arm, settings, first, seed)
        for settings in members
        for seed in seeds
    ]
    population = _Population(suggestion, config, student) if tune.search == "pbt" else None

    training = learn(jobs, reader, windows)
    exploits: list[Exploit] | None = None
    for window in windows:
        outcomes = _seed_means(training.send(exploits), tune.seeds)
        has_failed = all(isinstance(outcome, str) for outcome in outcomes)
        if window >= first or has_failed:
            yield [
                _entry(outcome, settings, tune.calibration)
                for outcome, settings in zip(outcomes, members, strict=True)
            ]
        if has_failed:
            return
        exploits = None
        if population and first <= window < last:
            exploits = population.evolve(outcomes, members)


class _Population:
    """Draws the exploits of one trial group, the same ones whenever it is trained."""

    def __init__(
        self,
        suggestion: Mapping[str, Any],
        config: Config,
        student: StudentConfig,
    ) -> None:
        assert config.tune is not None
        self._config = config
        self._tune = config.tune
        self._student = student
        self._arm = suggestion["arm"]
        first_number = suggestion[MEMBERS][0]["number"]
        seed = short_hash([config.seed, suggestion["student"], self._arm, first_number])
        self._rng = np.random.default_rng(int(seed, 16))

    def evolve(self, outcomes: Sequence[Outcome], members: list[Settings]) -> list[Exploit]:
        """Replace the settings of poor members in `members`, and return the exploits."""
        scores = [
            score(outcome, self._tune.calibration) if isinstance(outcome, Figures) else math.inf
            for outcome in outcomes
        ]
        space = Space(self._tune.space_of(self._arm))
        first, _ = self._tune.validation_windows
        exploits: list[Exploit] = []
        for source, target in exploit(scores, self._rng):
            settings = explore(members[source], space, self._rng)
            members[target] = settings
            job = trial_job(
                self._config, self._student, self._arm, settings, first, self._config.seed
            )
            exploits.append((source, target, job))
        return exploits


def _seed_means(outcomes: Sequence[Outcome], seeds: int) -> list[Outcome]:
    """The outcome of each member from those of its trainings, `seeds` for each member."""
    starts = range(0, len(outcomes), seeds)
    return [mean(outcomes[start : start + seeds]) for start in starts]


def mean(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the mean of a trial's outcomes over seeds, or the first error.

    Labels are not summed: all seeds have the same ones, so chance in them does not shrink with
    more seeds.
    """
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if errors:
        return errors[0]
    figures = [outcome for outcome in outcomes if isinstance(outcome, Figures)]
    if not figures:
        return None
    n = len(figures)
    return Figures(
        window=figures[0].window,
        ne=sum(one_seed.ne for one_seed in figures) / n,
        calibration=sum(one_seed.calibration for one_seed in figures) / n,
        labels=figures[0].labels,
    )


def _entry(
    outcome: Outcome,
    settings: Settings,
    bounds: tuple[float, float],
) -> Entry:
    if isinstance(outcome, str):
        return {FAILED: outcome}
    assert outcome is not None, "a counted window has figures"
    return {**outcome._asdict(), SCORE: score(outcome, bounds), "settings": settings}
