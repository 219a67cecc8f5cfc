"""A tiny run whose FM and DAS are finished, and trials in the engine's workers, for sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from local_runs import score, train
from small_runs import small_config
from workers import Workers

from exfm_ray.config.root import Config
from exfm_ray.config.tune import Settings
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.training.job import Job
from tuning.rows import StudentRows
from tuning.trial import Outcome, learn, trial_job

SWEEP: dict[str, Any] = {
    "students": ["feed"],
    "arms": ["labels", "ah", "kd"],
    "trials": 3,
    "trials_per_process": 2,
    "seeds": 2,
    "validation_windows": [1, 2],
    "holdout_windows": [3, 3],
    "judge_seeds": 2,
    "calibration": [0.5, 2],
    "early_stopping": "none",
    "space": {
        "vm.optimizer.table_lr": {"low": 0.01, "high": 0.2, "log": True},
        "distillation.ah.w": {"low": 0.1, "high": 3},
        "distillation.ah.mlp": {"choice": [[], [4]]},
        "vm.optimizer.dense_lr": {"choice": [1e30], "arms": ["kd"]},  # every trial of kd diverges
    },
}


def taught(
    groups: dict[int, Workers],
    folder: Path,
    **changes: Any,
) -> Config:
    """Return the config of a run whose FM and DAS are finished."""
    models = [{"name": name, "domain": name, "task": "click"} for name in ("feed", "search")]
    config = small_config(folder, "taught", vm={"models": models}, **changes)
    windows = prepare_stream(config).windows()
    groups[1].run(train, Job("fm", config), windows, None)
    groups[1].run(score, config)
    return config


def trials(
    config: Config,
    student: str,
    arm: str,
    members: Sequence[Settings],
    count_from: int,
    last: int,
    seeds: int = 1,
) -> list[list[Outcome]]:
    """Train together over windows 0 to `last`; return the outcomes of each counted window.

    There is one training for each member and each seed.
    """
    spec = next(s for s in config.vm.models if s.name == student)
    windows = range(last + 1)
    jobs = [
        trial_job(config, spec, arm, settings, count_from, seed)
        for settings in members
        for seed in range(seeds)
    ]
    return list(learn(jobs, StudentRows.read_from(config, spec, windows), windows))[count_from:]
