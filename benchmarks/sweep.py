"""python -m benchmarks.sweep [--quick]: what a sweep costs beside its trials, and what trials cost
that learn together.

On the synthetic stream (configs/tune_demo.yaml with larger windows), one torch thread a process:
1. 32 trials of one student (16 of labels, 16 of ah_sa, early stopping off), two side by side:
   seconds from the first trial asked for until the last is written down, against the sum of the
   trials' own seconds divided by two. FM, DAS, Ray's start and the students' rows lie before it,
   the judgement behind it. Once more with 4 trials in a process.
2. 8 trainings in one process together, against the same one after the other: ratio of their
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
from exfm_ray.data.stream import EventStream
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.runner import PipelineRunner
from exfm_ray.pipeline.schedule import Role
from exfm_ray.runtime.session import ray_session
from exfm_ray.training.job import Job
from tuning.rows import StudentRows
from tuning.sweep import search
from tuning.trial import Figures, learn, trial_job
from tuning.wandb_trials import TrialRuns

SAYS = "Sweeps 32 trials twice, and trains 8 students together and apart: about 8 minutes on two cores (--quick: 2)."
ROOT = Path(__file__).parents[1]
TOGETHER = 8
SLOTS = 2


def config(folder: str, quick: bool) -> Config:
    """The demo's sweep: one student, larger windows."""
    sizes = [
        f"data.synthetic.events_per_window={8000 if quick else 48_000}",
        f"tune.trials={4 if quick else 16}",
    ]
    choice = [
        "tune.arms=[labels, ah_sa]",
        "tune.students=[feed]",
        "tune.early_stopping=none",
        f"tune.max_concurrent={SLOTS}",
        "vm.threads=1",
    ]
    return load_config(
        ROOT / "configs" / "tune_demo.yaml",
        [f"run.dir={folder}", "wandb.mode=disabled", *sizes, *choice],
    )


def with_together(settings: Config, together: int) -> Config:
    """The same sweep with so many trials in a process."""
    assert settings.tune is not None
    return settings.model_copy(
        update={"tune": settings.tune.model_copy(update={"together": together})}
    )


def swept(settings: Config, rows: Any) -> dict[str, float]:
    """Seconds of one sweep, and of its trials."""
    assert settings.tune is not None
    students = [s for s in settings.vm.models if s.name in settings.tune.students]
    (settings.folder / "tune" / "trials.parquet").unlink(missing_ok=True)
    started = time.perf_counter()
    with closing(TrialRuns(settings)) as runs:
        trials = search(settings, settings.tune, students, {students[0].name: rows}, runs)
    seconds = time.perf_counter() - started
    own = sum(trial.seconds for trial in trials)
    assert all(trial.state == "complete" for trial in trials)
    return {
        "trials": len(trials),
        "seconds": seconds,
        "mean_trial_seconds": own / len(trials),
        "over_trials": seconds * SLOTS / own,
    }


def last_figures(
    jobs: Sequence[Job],
    reader: FragmentReader,
    windows: range,
) -> list[Figures]:
    """Figures after the last window."""
    *_, outcomes = learn(jobs, reader, windows)
    assert all(isinstance(outcome, Figures) for outcome in outcomes)
    return [outcome for outcome in outcomes if isinstance(outcome, Figures)]


def together(
    settings: Config,
    rows: StudentRows,
    arm: str,
    repetitions: int,
) -> dict[str, float]:
    """Trainings that differ in rates, weights and seeds, together and one after the other."""
    student = settings.vm.models[0]
    windows = range(6)
    knobs: list[dict[str, Any]] = [
        {
            "vm.optimizer.table_lr": 0.02 * 1.3**i,
            "distillation.ah.w": 0.3 + i,
            "distillation.sa.lr": 1e-3 * (i + 1),
        }
        for i in range(TOGETHER)
    ]
    jobs = [trial_job(settings, student, arm, knob, 1, seed) for seed, knob in enumerate(knobs)]
    ratios = []
    differences = []
    for _ in range(repetitions):
        started = time.perf_counter()
        apart = [last_figures([job], rows, windows)[0] for job in jobs]
        half = time.perf_counter()
        told = last_figures(jobs, rows, windows)
        ratios.append((half - started) / (time.perf_counter() - half))
        differences += [abs(one.ne - other.ne) for one, other in zip(apart, told, strict=True)]
    return {"times_faster": statistics.median(ratios), "largest_ne_difference": max(differences)}


def main() -> None:
    options = arguments("benchmarks.sweep", SAYS)
    with tempfile.TemporaryDirectory() as folder:
        settings = config(folder, options.quick)
        stream: EventStream = prepare_stream(settings)
        with ray_session(settings):
            PipelineRunner(settings, stream).execute(frozenset({Role.FM, Role.DAS}))
            rows = StudentRows.read_from(settings, settings.vm.models[0], stream.windows())
            kept = ray.put(rows)
            figures: dict[str, Any] = {"alone": swept(settings, kept)}
            print("a process each", figures["alone"], flush=True)
            figures["together_4"] = swept(with_together(settings, 4), kept)
            print("4 in a process", figures["together_4"], flush=True)
        for arm in ("labels", "ah_sa"):
            figures[f"{TOGETHER}_{arm}"] = together(settings, rows, arm, 1 if options.quick else 3)
            print(arm, figures[f"{TOGETHER}_{arm}"], flush=True)
    bars = {"sweep_over_trials": bar(figures["alone"]["over_trials"], 1.3, at_least=False)}
    bars |= {
        f"together_{arm}": bar(figures[f"{TOGETHER}_{arm}"]["times_faster"], 3.0)
        for arm in ("labels", "ah_sa")
    }
    report("sweep", figures, bars)


if __name__ == "__main__":
    main()
