"""Analysis of a sweep: best configs, gains on the holdout windows, importance of the settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna

from exfm_ray.config.checks import with_settings
from exfm_ray.config.load import dump_config
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.config.tune import Settings, TuneConfig
from exfm_ray.metrics.gain import exceeds_spread, gains_over_labels, pool
from exfm_ray.storage.atomic import write_json, write_text
from exfm_ray.tracking.recorder import read_metrics
from exfm_ray.training.metric_rows import FM_ARM
from tuning.holdout import VARIANTS, HoldoutResult, best_trial
from tuning.results import Search, Trial
from tuning.search import to_frozen_trial
from tuning.space import Space

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % confidence interval (t distribution).

    Attributes:
        mean: mean over the seeds.
        low: lower end of the interval; None with one seed.
        high: upper end of the interval; None with one seed.
        seeds: number of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean of `values` with its confidence interval, or None without a value."""
    from scipy.stats import t  # takes a second to import

    if not values:
        return None
    n = len(values)
    if n == 1:
        return Estimate(values[0], None, None, 1)

    mean = float(np.mean(values))
    standard_error = float(np.std(values, ddof=1)) / math.sqrt(n)
    half_width = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * standard_error
    return Estimate(mean, mean - half_width, mean + half_width, n)


def fm_ne(
    config: Config,
    student: StudentConfig,
    windows: tuple[int, int],
) -> float | None:
    """Return the FM's NE on a student's examples, or None where it has no figures.

    Args:
        config: the run's config; its metrics.jsonl holds the FM's figures.
        student: the mean is over this student's tasks.
        windows: first and last window, whose examples count together.
    """
    first, last = windows
    rows = [
        row
        for row in read_metrics(config.folder / "metrics.jsonl")
        if row["arm"] == FM_ARM
        and row["domain"] == student.domain
        and first <= row["window"] <= last
    ]
    nes = []
    for task in student.tasks:
        task_rows = [row for row in rows if row["task"] == task and row["examples"]]
        ne = pool(task_rows).ne if task_rows else None
        if ne is None:
            return None
        nes.append(ne)
    return float(np.mean(nes))


def arm_figures(
    results: Sequence[HoldoutResult],
    baseline: Mapping[int, float],
    fm: float | None,
) -> dict[str, Any]:
    """Compute one arm's NE, calibration, NE gain and transfer ratio over seeds.

    Args:
        results: trainings of one arm and variant, one per seed.
        baseline: seed -> NE of the tuned labels arm. A gain is over the same seed.
        fm: NE of the FM on the same examples.

    Returns:
        An estimate per figure, or None, and the number of failed trainings. The transfer ratio is
        None for the labels arm, and where the FM's own gain is within its spread over seeds,
        because it says nothing there.
    """
    done = [result for result in results if result.ne is not None]
    gains = [
        gains_over_labels(result.ne, baseline[result.seed], fm)
        for result in done
        if result.seed in baseline
    ]
    fm_gains = [gain.fm_ne_gain for gain in gains if gain.fm_ne_gain is not None]
    is_labels_arm = any(result.arm == "labels" for result in done)
    has_ratio = exceeds_spread(fm_gains) and not is_labels_arm
    return {
        "ne": _estimate_entry([result.ne for result in done]),
        "calibration": _estimate_entry([result.calibration for result in done]),
        "ne_gain": _estimate_entry([gain.ne_gain for gain in gains]),
        "transfer_ratio": _estimate_entry([gain.transfer_ratio for gain in gains if has_ratio]),
        "failed": len(results) - len(done),
    }


def _estimate_entry(values: Sequence[float | None]) -> dict[str, Any] | None:
    """The estimate of the values that are there, as a JSON object."""
    estimated = estimate([value for value in values if value is not None])
    return estimated._asdict() if estimated else None


def importance(
    trials: Sequence[Trial],
    space: Space,
    tune: TuneConfig,
) -> dict[str, float]:
    """Return each setting's fraction of the differences in NE between complete trials.

    Computed by PED-ANOVA, Optuna's default. Empty where fewer than two complete trials differ.
    """
    complete = [trial for trial in trials if trial.state == "complete"]
    distinct_nes = {trial.curve[-1].ne for trial in complete}
    if len(distinct_nes) < 2:
        return {}

    study = optuna.create_study()
    for trial in complete:
        frozen = to_frozen_trial(trial, space, tune)
        # NE, not the score: leaving the bounds of calibration would drown all other differences.
        frozen.value = trial.curve[-1].ne
        study.add_trial(frozen)
    importances = optuna.importance.get_param_importances(study)
    return {name: float(fraction) for name, fraction in importances.items()}


def best_config(
    config: Config,
    student: StudentConfig,
    arm: str,
    settings: Settings,
) -> Config:
    """Return the config with this student only, its labels arm and `arm` under `settings`."""
    student_only = {
        "vm.models": [student.model_dump(mode="json")],
        "vm.arms": list(dict.fromkeys(["labels", arm])),
        "name": f"{config.name}-best-{student.name}",
    }
    return with_settings(config, {**student_only, **settings})


def analyze(
    config: Config,
    tune: TuneConfig,
    students: Sequence[StudentConfig],
    trials: Sequence[Trial],
    results: Sequence[HoldoutResult],
    folder: Path,
) -> dict[str, Any]:
    """Write best/<student>.yaml and summary.json into `folder` and return the summary."""
    summaries = {}
    for student in students:
        student_results = [result for result in results if result.student == student.name]
        summaries[student.name] = _student_summary(config, tune, student, trials, student_results)
    for student in students:
        _write_best_config(config, tune, student, trials, summaries[student.name], folder)

    states = [trial.state for trial in trials]
    summary = {
        "name": config.name,
        "score_windows": list(tune.validation_windows),
        "judge_windows": list(tune.holdout_windows),
        "seeds": list(range(config.seed, config.seed + tune.judge_seeds)),
        "trials": {state: states.count(state) for state in ("complete", "stopped", "failed")},
        "trial_seconds": sum(trial.seconds for trial in trials),
        "students": summaries,
    }
    write_json(folder / "summary.json", summary)
    return summary


def _write_best_config(
    config: Config,
    tune: TuneConfig,
    student: StudentConfig,
    trials: Sequence[Trial],
    student_summary: Mapping[str, Any],
    folder: Path,
) -> None:
    arm = student_summary["best_arm"]
    best = best_trial(trials, Search(student.name, arm)) if arm else None
    if not best:
        return
    first, last = tune.validation_windows
    comment = (
        f"# Student {student.name}: the best distilled arm ({arm}) of sweep {config.name}, "
        f"trial {best.number}, chosen on windows\n"
        f"# {first} to {last}. The labels arm beside it has the same optimizer settings, "
        f"not its own best.\n"
    )
    text = dump_config(best_config(config, student, arm, best.settings))
    write_text(folder / "best" / f"{student.name}.yaml", comment + text)


def _student_summary(
    config: Config,
    tune: TuneConfig,
    student: StudentConfig,
    trials: Sequence[Trial],
    results: Sequence[HoldoutResult],
) -> dict[str, Any]:
    fm = fm_ne(config, student, tune.holdout_windows)
    baseline = {
        result.seed: result.ne
        for result in results
        if (result.arm, result.variant) == ("labels", "tuned") and result.ne is not None
    }

    arms: dict[str, Any] = {}
    for arm in tune.arms:
        search = Search(student.name, arm)
        searched = [trial for trial in trials if trial.search == search]
        arms[arm] = {
            "best": _best_entry(best_trial(trials, search)),
            "importance": importance(searched, Space(tune.space_of(arm)), tune),
        }
        for variant in VARIANTS:
            key = (arm, variant)
            own_results = [result for result in results if (result.arm, result.variant) == key]
            arms[arm][variant] = arm_figures(own_results, baseline, fm)
    arms["labels"]["tuned"]["ne_gain"] = None  # over itself
    return {"fm_ne": fm, "best_arm": _best_arm(arms), "arms": arms}


def _best_arm(arms: Mapping[str, Any]) -> str | None:
    """The distilled arm with the lowest score; labels where no distilled arm has one."""
    scores = {arm: entry["best"]["score"] for arm, entry in arms.items() if entry["best"]}
    distilled = {arm: score for arm, score in scores.items() if arm != "labels"}
    candidates = distilled or scores
    return min(candidates, key=lambda arm: candidates[arm]) if candidates else None


def _best_entry(best: Trial | None) -> dict[str, Any] | None:
    if best is None:
        return None
    return {
        "trial": best.number,
        "score": best.score,
        **best.curve[-1]._asdict(),
        "settings": best.settings,
    }
