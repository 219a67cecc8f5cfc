"""Judges what a sweep has chosen: the best of each arm and the untuned arm, trained anew over all
windows with several seeds."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
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
from tuning.trial import Figures, Outcome, learn, trial_job

Variant = Literal["tuned", "untuned"]


@dataclass(frozen=True)
class HoldoutResult:
    """Figures of one training on the judge windows together; None where it failed with `error`."""

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
        """What was trained, without its figures."""
        return json.dumps(
            [self.student, self.arm, self.variant, self.seed, self.settings], sort_keys=True
        )


def best_trial(trials: Sequence[Trial], search: Search) -> Trial | None:
    """The complete trial of the lowest score; None where none was completed."""
    complete = [
        t for t in trials if t.search == search and t.state == "complete" and t.score is not None
    ]
    return min(complete, key=lambda t: (t.score, t.number), default=None)


def judge(
    config: Config,
    sweep: TuneConfig,
    students: Sequence[StudentConfig],
    rows: Mapping[str, Any],
    trials: Sequence[Trial],
    path: Path,
) -> list[HoldoutResult]:
    """Train what `path` does not hold yet, the seeds together and `sweep.max_concurrent` processes
    side by side; all results.

    Needs a Ray session.
    """
    wanted: list[HoldoutResult] = []
    for student in students:
        for arm in sweep.arms:
            best = best_trial(trials, Search(student.name, arm))
            variants: list[tuple[Variant, Settings]] = [("untuned", {})]
            if best:
                variants.append(("tuned", best.settings))
            seeds = range(config.seed, config.seed + sweep.judge_seeds)
            wanted += [
                HoldoutResult(student.name, arm, variant, seed, settings)
                for variant, settings in variants
                for seed in seeds
            ]
    known = {one.identity: one for one in _read(path)}
    missing = [
        list(seeds)
        for _, seeds in groupby((one for one in wanted if one.identity not in known), _but_seed)
    ]
    by_name = {student.name: student for student in students}
    train = ray.remote(num_cpus=1, label_selector=config.placement.vm)(_train)
    running: list[Any] = []
    for number in range(len(missing) + sweep.max_concurrent):
        if number < len(missing):
            student_name = missing[number][0].student
            running.append(
                train.remote(config, by_name[student_name], missing[number], rows[student_name])
            )
        if running and (len(running) >= sweep.max_concurrent or number >= len(missing)):
            (ended,), running = ray.wait(running, num_returns=1)
            results: list[HoldoutResult] = ray.get(ended)
            known |= {one.identity: one for one in results}
            write_json(path, [asdict(one) for one in known.values()])
            for one in results:
                print(
                    f"judged: {one.student} {one.arm} {one.variant} seed {one.seed}: {one.ne or one.error}",
                    file=sys.stderr,
                )
    return [known[one.identity] for one in wanted]


def _read(path: Path) -> list[HoldoutResult]:
    entries = read_json(path) if path.exists() else []
    return [
        HoldoutResult(
            **{
                **e,
                "settings": {
                    k: tuple(v) if isinstance(v, list) else v for k, v in e["settings"].items()
                },
            }
        )
        for e in entries
    ]


def _but_seed(one: HoldoutResult) -> tuple[str, str, str]:
    return one.student, one.arm, one.variant


def _train(
    config: Config,
    student: StudentConfig,
    seeds: Sequence[HoldoutResult],
    rows: Any,
) -> list[HoldoutResult]:
    """`seeds`, which learn together, with their figures. What goes wrong in a training is a result
    too."""
    assert config.tune is not None
    first, last = config.tune.holdout_windows
    try:
        jobs = [trial_job(config, student, one.arm, one.settings, first, one.seed) for one in seeds]
        *_, outcomes = learn(jobs, rows, range(last + 1))
    except Exception as error:
        outcomes = [f"{type(error).__name__}: {error}" for _ in seeds]
    return [_judged(one, outcome) for one, outcome in zip(seeds, outcomes, strict=True)]


def _judged(one: HoldoutResult, outcome: Outcome) -> HoldoutResult:
    if isinstance(outcome, Figures):
        return replace(one, ne=outcome.ne, calibration=outcome.calibration)
    return replace(one, error=outcome)
