"""Trainings on the holdout windows: the best trial of each arm and the untuned arm, several seeds.

Each one trains from the first window on. No choice of the sweep has seen the holdout windows.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import ray

from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.config.tune import Settings, TuneConfig
from exfm_ray.storage.atomic import read_json, write_json
from tuning.results import Search, Trial
from tuning.space import as_settings
from tuning.trial import Figures, Outcome, learn, trial_job

Variant = Literal["tuned", "untuned"]
VARIANTS: tuple[Variant, ...] = ("tuned", "untuned")
SeedGroup = list["HoldoutResult"]
"""Trainings that differ in the seed only and learn together in one process."""


@dataclass(frozen=True)
class HoldoutResult:
    """One training and its figures over all holdout windows together.

    Attributes:
        settings: the best trial's settings; empty for the untuned arm.
        ne: normalized entropy; None where the training failed.
        calibration: predictions over labels; None where the training failed.
        error: why the training failed.
    """

    student: str
    arm: str
    variant: Variant
    seed: int
    settings: Settings
    ne: float | None = None
    calibration: float | None = None
    error: str | None = None

    @property
    def identity(self) -> str:
        """What is trained, without its figures, as JSON."""
        fields = [self.student, self.arm, self.variant, self.seed, self.settings]
        return json.dumps(fields, sort_keys=True)


def best_trial(trials: Sequence[Trial], search: Search) -> Trial | None:
    """Return the complete trial with the lowest score, or None where no trial is complete."""
    complete = [
        trial
        for trial in trials
        if trial.search == search and trial.state == "complete" and trial.score is not None
    ]
    return min(complete, key=lambda trial: (trial.score, trial.number), default=None)


def evaluate_holdout(
    config: Config,
    sweep: TuneConfig,
    students: Sequence[StudentConfig],
    rows: Mapping[str, Any],
    trials: Sequence[Trial],
    path: Path,
) -> list[HoldoutResult]:
    """Train what the file `path` does not hold yet, and return all results.

    The seeds of an arm learn together in one process; `sweep.max_concurrent` processes run at a
    time. The file is rewritten after each process. Needs a Ray session.

    Args:
        rows: student -> reference of its `StudentRows` in Ray's object store.
        trials: all trials of the sweep.
    """
    requested = _requested(config, sweep, students, trials)
    known = {result.identity: result for result in _read(path)}
    missing = [result for result in requested if result.identity not in known]
    seed_groups = [list(group) for _, group in groupby(missing, _without_seed)]

    for results in _train_groups(config, sweep, students, rows, seed_groups):
        known |= {result.identity: result for result in results}
        write_json(path, [asdict(result) for result in known.values()])
        for result in results:
            training = f"{result.student} {result.arm} {result.variant} seed {result.seed}"
            print(f"holdout: {training}: {result.ne or result.error}", file=sys.stderr)
    return [known[result.identity] for result in requested]


def _requested(
    config: Config,
    sweep: TuneConfig,
    students: Sequence[StudentConfig],
    trials: Sequence[Trial],
) -> list[HoldoutResult]:
    """List all trainings of the holdout, without figures."""
    seeds = range(config.seed, config.seed + sweep.judge_seeds)
    requested: list[HoldoutResult] = []
    for student in students:
        for arm in sweep.arms:
            best = best_trial(trials, Search(student.name, arm))
            variants: list[tuple[Variant, Settings]] = [("untuned", {})]
            if best:
                variants.append(("tuned", best.settings))
            for variant, settings in variants:
                requested += [
                    HoldoutResult(student.name, arm, variant, seed, settings) for seed in seeds
                ]
    return requested


def _train_groups(
    config: Config,
    sweep: TuneConfig,
    students: Sequence[StudentConfig],
    rows: Mapping[str, Any],
    seed_groups: Sequence[SeedGroup],
) -> Iterator[SeedGroup]:
    """Train the groups in order, some at a time, and yield the results of each as it ends."""
    by_name = {student.name: student for student in students}
    train = ray.remote(num_cpus=1, label_selector=config.placement.vm)(_train)
    waiting = deque(seed_groups)
    running: list[Any] = []
    while waiting or running:
        while waiting and len(running) < sweep.max_concurrent:
            group = waiting.popleft()
            name = group[0].student
            running.append(train.remote(config, by_name[name], group, rows[name]))
        (ended,), running = ray.wait(running, num_returns=1)
        yield ray.get(ended)


def _read(path: Path) -> list[HoldoutResult]:
    entries = read_json(path) if path.exists() else []
    return [
        HoldoutResult(**{**entry, "settings": as_settings(entry["settings"])}) for entry in entries
    ]


def _without_seed(result: HoldoutResult) -> tuple[str, str, str]:
    return result.student, result.arm, result.variant


def _train(
    config: Config,
    student: StudentConfig,
    group: SeedGroup,
    rows: Any,
) -> SeedGroup:
    """Train the group together and return it with figures. An error is a result, too."""
    assert config.tune is not None
    first, last = config.tune.holdout_windows
    try:
        jobs = [
            trial_job(config, student, result.arm, result.settings, first, result.seed)
            for result in group
        ]
        *_, outcomes = learn(jobs, rows, range(last + 1))
    except Exception as error:
        outcomes = [f"{type(error).__name__}: {error}" for _ in group]
    return [_with_outcome(result, outcome) for result, outcome in zip(group, outcomes, strict=True)]


def _with_outcome(result: HoldoutResult, outcome: Outcome) -> HoldoutResult:
    if isinstance(outcome, Figures):
        return replace(result, ne=outcome.ne, calibration=outcome.calibration)
    return replace(result, error=outcome)
