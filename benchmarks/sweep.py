"""python -m benchmarks.sweep [--quick]: what a sweep and trials that learn together cost.

On the synthetic stream (configs/tune_demo.yaml with larger windows), one torch thread a process:
1. 32 trials of one student (16 of labels, 16 of ah_sa, early stopping off), two processes at a
   time: seconds from the first suggestion until the last trial is written, against the sum of the
   trials' own seconds divided by two. FM, DAS, Ray's start, the students' rows and the holdout
   trainings are not included. Then the same with 4 trials in a process.
2. 8 trainings together in one process, against the same ones one after the other: ratio of their
   seconds, the largest difference in NE. The median over paired repetitions.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import ray

from benchmarks.common import arguments, bar, report
from exfm_ray.config.load import load_config
from exfm_ray.config.root import Config
from exfm_ray.data.readers import FragmentReader
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.runner import PipelineRunner
from exfm_ray.pipeline.schedule import Role
from exfm_ray.runtime.session import ray_session
from exfm_ray.training.job import Job
from tuning.rows import StudentRows
from tuning.sweep import search
from tuning.trial import Figures, learn, trial_job
from tuning.wandb_trials import TrialRuns

DESCRIPTION = (
    "Sweeps 32 trials twice, and trains 8 students together and apart: "
    "about 8 minutes on two cores (--quick: 2)."
)
ROOT = Path(__file__).parents[1]
ARMS = ("labels", "ah_sa")
TOGETHER = 8
SLOTS = 2
WINDOWS = range(6)


def config(folder: str, quick: bool) -> Config:
    """Return the demo's sweep with one student and larger windows."""
    overrides = [
        f"run.dir={folder}",
        "wandb.mode=disabled",
        f"data.synthetic.events_per_window={8000 if quick else 48_000}",
        f"tune.trials={4 if quick else 16}",
        f"tune.arms=[{', '.join(ARMS)}]",
        "tune.students=[feed]",
        "tune.early_stopping=none",
        f"tune.max_concurrent={SLOTS}",
        "vm.threads=1",
    ]
    return load_config(ROOT / "configs" / "tune_demo.yaml", overrides)


def with_trials_per_process(settings: Config, trials: int) -> Config:
    """Return the same sweep with another number of trials in a process."""
    assert settings.tune is not None
    tune = settings.tune.model_copy(update={"trials_per_process": trials})
    return settings.model_copy(update={"tune": tune})


def swept(settings: Config, rows: Any) -> dict[str, float]:
    """Run one sweep; its seconds and those of its trials.

    Args:
        rows: reference of the student's rows.
    """
    assert settings.tune is not None
    (student,) = (model for model in settings.vm.models if model.name in settings.tune.students)
    (settings.folder / "tune" / "trials.parquet").unlink(missing_ok=True)
    started = time.perf_counter()
    with closing(TrialRuns(settings)) as runs:
        trials = search(settings, settings.tune, [student], {student.name: rows}, runs)
    seconds = time.perf_counter() - started

    trial_seconds = sum(trial.seconds for trial in trials)
    assert all(trial.state == "complete" for trial in trials)
    return {
        "trials": len(trials),
        "seconds": seconds,
        "mean_trial_seconds": trial_seconds / len(trials),
        "over_trials": seconds * SLOTS / trial_seconds,
    }


def last_figures(jobs: Sequence[Job], reader: FragmentReader) -> list[Figures]:
    """Train the jobs together; figures after the last window."""
    *_, outcomes = learn(jobs, reader, WINDOWS)
    assert all(isinstance(outcome, Figures) for outcome in outcomes)
    return [outcome for outcome in outcomes if isinstance(outcome, Figures)]


def together(
    settings: Config,
    rows: StudentRows,
    arm: str,
    repetitions: int,
) -> dict[str, float]:
    """Compare trainings together with the same ones one after the other.

    They differ in rates, weights and seeds.
    """
    student = settings.vm.models[0]
    jobs = []
    for number in range(TOGETHER):
        knobs: dict[str, Any] = {
            "vm.optimizer.table_lr": 0.02 * 1.3**number,
            "distillation.ah.w": 0.3 + number,
            "distillation.sa.lr": 1e-3 * (number + 1),
        }
        jobs.append(trial_job(settings, student, arm, knobs, 1, number))

    ratios = []
    differences = []
    for _ in range(repetitions):
        started = time.perf_counter()
        apart_figures = [last_figures([job], rows)[0] for job in jobs]
        apart_s = time.perf_counter() - started

        started = time.perf_counter()
        together_figures = last_figures(jobs, rows)
        together_s = time.perf_counter() - started

        ratios.append(apart_s / together_s)
        for apart, stacked in zip(apart_figures, together_figures, strict=True):
            differences.append(abs(apart.ne - stacked.ne))
    return {"times_faster": statistics.median(ratios), "largest_ne_difference": max(differences)}


def main() -> None:
    options = arguments("benchmarks.sweep", DESCRIPTION)
    repetitions = 1 if options.quick else 3
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = config(folder, options.quick)
        stream = prepare_stream(settings)
        with ray_session(settings):
            PipelineRunner(settings, stream).execute(frozenset({Role.FM, Role.DAS}))
            rows = StudentRows.read_from(settings, settings.vm.models[0], stream.windows())
            reference = ray.put(rows)
            figures["alone"] = swept(settings, reference)
            print("a process each", figures["alone"], flush=True)
            figures["together_4"] = swept(with_trials_per_process(settings, 4), reference)
            print("4 in a process", figures["together_4"], flush=True)

        bars = {"sweep_over_trials": bar(figures["alone"]["over_trials"], 1.3, at_least=False)}
        for arm in ARMS:
            comparison = together(settings, rows, arm, repetitions)
            print(arm, comparison, flush=True)
            figures[f"{TOGETHER}_{arm}"] = comparison
            bars[f"together_{arm}"] = bar(comparison["times_faster"], 3.0)
    report("sweep", figures, bars)


if __name__ == "__main__":
    main()
