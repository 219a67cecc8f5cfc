"""What a block's process runs. A block is one trial of Ray Tune: trials of one student and arm, its
members, that learn together."""

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
from tuning.space import Space
from tuning.trial import Exploit, Figures, Outcome, learn, score, trial_job

Entry = dict[str, Any]
"""What is reported of a member: its figures, its score and the settings behind them; or its
error."""


def run_trial_group(
    asked: dict[str, Any],
    config: Config,
    students: Mapping[str, StudentConfig],
    rows: Mapping[str, Any],
) -> None:
    """Reports after each score window an entry for each member, in order, and ends when all have
    failed."""
    try:
        student = students[asked["student"]]
        reader = get_with_timeout(rows[student.name], f"a trial of {student.name}", "its rows")
        for entries in train_members(asked, config, student, reader):
            ray_tune.report(
                {MEMBERS: entries, SCORE: min(entry.get(SCORE, math.inf) for entry in entries)}
            )
    except Exception as error:
        failed = [{FAILED: f"{type(error).__name__}: {error}"} for _ in asked["members"]]
        ray_tune.report({MEMBERS: failed, SCORE: math.inf})


def train_members(
    asked: Mapping[str, Any],
    config: Config,
    student: StudentConfig,
    reader: FragmentReader,
) -> Iterator[list[Entry]]:
    """Train the members of a block, each with all seeds; yields after each score window, and when
    all have failed, their entries."""
    tune = config.tune
    assert tune is not None
    first, last = tune.validation_windows
    members = [as_settings(member["settings"]) for member in asked["members"]]
    seeds = range(config.seed, config.seed + tune.seeds)
    jobs = [
        trial_job(config, student, asked["arm"], settings, first, seed)
        for settings in members
        for seed in seeds
    ]
    rng = np.random.default_rng(
        int(
            short_hash(
                [config.seed, asked["student"], asked["arm"], asked["members"][0]["number"]]
            ),
            16,
        )
    )
    learning = learn(jobs, reader, range(last + 1))
    moves = None
    for window in range(last + 1):
        outcomes = learning.send(moves)
        told = [
            mean(outcomes[start : start + len(seeds)])
            for start in range(0, len(outcomes), len(seeds))
        ]
        failed = all(isinstance(one, str) for one in told)
        if window >= first or failed:
            yield [
                _entry(one, settings, tune.calibration)
                for one, settings in zip(told, members, strict=True)
            ]
        if failed:
            return
        moves = None
        if tune.search == "pbt" and first <= window < last:
            scores = [
                score(one, tune.calibration) if isinstance(one, Figures) else math.inf
                for one in told
            ]
            moves = list[Exploit]()
            for source, target in exploit(scores, rng):
                members[target] = explore(members[source], Space(tune.space_of(asked["arm"])), rng)
                moves.append(
                    (
                        source,
                        target,
                        trial_job(
                            config, student, asked["arm"], members[target], first, config.seed
                        ),
                    )
                )


def mean(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of a trial's trainings with several seeds; the first error where any has failed.

    Labels are not added up: all have the same ones, and chance in them does not wane with more
    seeds.
    """
    errors = [one for one in outcomes if isinstance(one, str)]
    figures = [one for one in outcomes if isinstance(one, Figures)]
    if errors or not figures:
        return errors[0] if errors else None
    n = len(figures)
    return Figures(
        figures[0].window,
        sum(f.ne for f in figures) / n,
        sum(f.calibration for f in figures) / n,
        figures[0].labels,
    )


def as_settings(asked: Mapping[str, Any]) -> Settings:
    """Settings as Tune and JSON give them back, lists as tuples again."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()
    }


def _entry(
    outcome: Outcome,
    settings: Settings,
    bounds: tuple[float, float],
) -> Entry:
    if isinstance(outcome, str):
        return {FAILED: outcome}
    assert outcome is not None, "a counted window has figures"
    return {**outcome._asdict(), SCORE: score(outcome, bounds), "settings": settings}
