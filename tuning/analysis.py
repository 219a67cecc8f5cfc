"""What a sweep has found: best configs, gains on windows that no choice has seen, importance of the
settings."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from rich.console import Console
from rich.table import Table

from exfm_ray.config.checks import with_settings
from exfm_ray.config.load import dump_config
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.config.tune import Settings, TuneConfig
from exfm_ray.metrics.gain import exceeds_spread, ne_gain, pool, transfer_ratio
from exfm_ray.storage.atomic import write_json, write_text
from exfm_ray.tracking.recorder import read_metrics
from exfm_ray.training.loop import FM_ARM
from tuning.holdout import HoldoutResult, best_trial
from tuning.results import Search, Trial
from tuning.search import to_frozen_trial
from tuning.space import Space

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """Mean over seeds and the ends of its 95 % confidence interval (t distribution); the ends are
    None with one seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean of `values` and its confidence interval; None without a value."""
    from scipy.stats import t  # takes a second to import

    n = len(values)
    if n < 2:
        return Estimate(values[0], None, None, 1) if values else None
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return Estimate(mean, mean - reach, mean + reach, n)


def fm_ne(
    config: Config,
    student: StudentConfig,
    windows: tuple[int, int],
) -> float | None:
    """The FM's NE on the student's examples in `windows`, mean over the student's tasks; None where
    its figures are not there."""
    wanted = [
        row
        for row in read_metrics(config.folder / "metrics.jsonl")
        if row["arm"] == FM_ARM
        and row["domain"] == student.domain
        and windows[0] <= row["window"] <= windows[1]
    ]
    tasks = [[row for row in wanted if row["task"] == task] for task in student.tasks]
    if not all(tasks):
        return None
    task_nes = [pool(rows).ne for rows in tasks]
    known = [ne for ne in task_nes if ne is not None]
    return float(np.mean(known)) if len(known) == len(tasks) else None


def compared(
    judged: Sequence[HoldoutResult],
    baseline: Mapping[int, float],
    fm: float | None,
) -> dict[str, Any]:
    """Figures of one arm: NE, calibration, NE gain over the tuned labels arm of the same seed
    (`baseline`), transfer ratio.

    The transfer ratio is null for the labels arm, and where the FM's own gain is within its spread
    over seeds: there it says nothing.
    """
    done = [one for one in judged if one.ne is not None and one.calibration is not None]
    paired = [
        (ne_gain(one.ne, baseline[one.seed]), ne_gain(fm, baseline[one.seed]))
        for one in done
        if one.seed in baseline
    ]
    gains = [g for g, _ in paired if g is not None]
    fm_gains = [f for _, f in paired if f is not None]
    telling = exceeds_spread(fm_gains) and all(one.arm != "labels" for one in done)
    ratios = [transfer_ratio(g, f) for g, f in paired] if telling else []
    lists = {
        "ne": [one.ne for one in done if one.ne is not None],
        "calibration": [one.calibration for one in done if one.calibration is not None],
        "ne_gain": gains,
        "transfer_ratio": [r for r in ratios if r is not None],
    }
    told = {key: estimate(values) for key, values in lists.items()}
    return {
        **{key: value._asdict() if value else None for key, value in told.items()},
        "failed": len(judged) - len(done),
    }


def importance(
    trials: Sequence[Trial],
    space: Space,
    tune: TuneConfig,
) -> dict[str, float]:
    """Share of each setting in the differences of NE between the complete trials (PED-ANOVA); empty
    where there are too few."""
    complete = [trial for trial in trials if trial.state == "complete"]
    if len({trial.curve[-1].ne for trial in complete}) < 2:
        return {}
    study = optuna.create_study()
    for trial in complete:
        known = to_frozen_trial(trial, space, tune)
        known.value = trial.curve[
            -1
        ].ne  # not the score: leaving the bounds of calibration would drown all else
        study.add_trial(known)
    return {
        name: float(share) for name, share in optuna.importance.get_param_importances(study).items()
    }


def best_config(
    config: Config,
    student: StudentConfig,
    arm: str,
    settings: Settings,
) -> Config:
    """The config with this student alone, its labels arm and `arm` under `settings`."""
    alone = {
        "vm.models": [student.model_dump(mode="json")],
        "vm.arms": list(dict.fromkeys(["labels", arm])),
    }
    return with_settings(
        config, {**alone, "name": f"{config.name}-best-{student.name}", **settings}
    )


def analyse(
    config: Config,
    tune: TuneConfig,
    students: Sequence[StudentConfig],
    trials: Sequence[Trial],
    judged: Sequence[HoldoutResult],
    folder: Path,
) -> dict[str, Any]:
    """Write best/<student>.yaml and summary.json into `folder`; the summary."""
    told = {
        student.name: _student(
            config, tune, student, trials, [one for one in judged if one.student == student.name]
        )
        for student in students
    }
    for student in students:
        chosen = told[student.name]["best_arm"]
        best = best_trial(trials, Search(student.name, chosen)) if chosen else None
        if best:
            text = dump_config(best_config(config, student, chosen, best.settings))
            comment = (
                f"# Student {student.name}: the best distilled arm ({chosen}) of sweep {config.name}, trial {best.number}, chosen on windows\n"
                f"# {tune.validation_windows[0]} to {tune.validation_windows[1]}. The labels arm beside it has the same optimizer settings, not its own best.\n"
            )
            write_text(folder / "best" / f"{student.name}.yaml", comment + text)
    states = [trial.state for trial in trials]
    summary = {
        "name": config.name,
        "score_windows": list(tune.validation_windows),
        "judge_windows": list(tune.holdout_windows),
        "seeds": list(range(config.seed, config.seed + tune.judge_seeds)),
        "trials": {state: states.count(state) for state in ("complete", "stopped", "failed")},
        "trial_seconds": sum(trial.seconds for trial in trials),
        "students": told,
    }
    write_json(folder / "summary.json", summary)
    return summary


def _student(
    config: Config,
    tune: TuneConfig,
    student: StudentConfig,
    trials: Sequence[Trial],
    judged: Sequence[HoldoutResult],
) -> dict[str, Any]:
    fm = fm_ne(config, student, tune.holdout_windows)
    baseline = {
        one.seed: one.ne
        for one in judged
        if (one.arm, one.variant) == ("labels", "tuned") and one.ne is not None
    }
    arms: dict[str, Any] = {}
    for arm in tune.arms:
        search = Search(student.name, arm)
        best = best_trial(trials, search)
        arms[arm] = {
            "best": {
                "trial": best.number,
                "score": best.score,
                **best.curve[-1]._asdict(),
                "settings": best.settings,
            }
            if best
            else None,
            "importance": importance(
                [t for t in trials if t.search == search], Space(tune.space_of(arm)), tune
            ),
            **{
                v: compared(
                    [one for one in judged if (one.arm, one.variant) == (arm, v)], baseline, fm
                )
                for v in ("tuned", "untuned")
            },
        }
    arms["labels"]["tuned"]["ne_gain"] = None  # over itself
    found = {arm: told["best"]["score"] for arm, told in arms.items() if told["best"]}
    distilled = {arm: value for arm, value in found.items() if arm != "labels"} or found
    return {
        "fm_ne": fm,
        "best_arm": min(distilled, key=lambda arm: distilled[arm]) if distilled else None,
        "arms": arms,
    }


def show(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the summary as a table."""
    console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 120)))
    first, last = summary["judge_windows"]
    table = Table(
        title=f"{summary['name']}: windows {first} to {last}, mean of {len(summary['seeds'])} seeds; gain over tuned labels"
    )
    for heading in ("student", "arm", ""):
        table.add_column(heading)
    for heading in ("NE", "calibr.", "NE gain %", "95 % interval", "TR"):
        table.add_column(heading, justify="right")
    for name, student in summary["students"].items():
        if student["fm_ne"] is not None:
            table.add_row(name, "fm", "", f"{student['fm_ne']:.4f}", "", "", "", "")
        for arm, told in student["arms"].items():
            for variant in ("untuned", "tuned"):
                table.add_row(
                    name,
                    arm,
                    variant + (" *" if arm == student["best_arm"] and variant == "tuned" else ""),
                    *_cells(told[variant]),
                )
    console.print(table)
    states = ", ".join(f"{count} {state}" for state, count in summary["trials"].items())
    console.print(
        f"Trials: {states}. * chosen on the score windows. Everything is in {folder}",
        highlight=False,
        soft_wrap=True,
    )


def _cells(told: Mapping[str, Any]) -> list[str]:
    def mean(
        key: str,
        form: str,
        scale: float = 1.0,
    ) -> str:
        return format(told[key]["mean"] * scale, form) if told[key] else ""

    gain = told["ne_gain"]
    interval = (
        f"{gain['low'] * 100:.2f} to {gain['high'] * 100:.2f}"
        if gain and gain["low"] is not None
        else ""
    )
    return [
        mean("ne", ".4f"),
        mean("calibration", ".3f"),
        mean("ne_gain", ".2f", 100),
        interval,
        mean("transfer_ratio", ".2f"),
    ]
