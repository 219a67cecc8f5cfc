"""A sweep: trial groups of every student and arm, some at a time under Ray Tune.

The students' rows lie in the object store once.

<run>/tune/trials.parquet       every finished trial; a killed sweep resumes from it
<run>/tune/judged.json          the best and the untuned of each arm on the holdout windows, by seed
<run>/tune/best/<student>.yaml  a config for `run.py pipeline`
<run>/tune/summary.json         figures, gains, importance of the settings
<run>/tune/plots.html           NE against each setting, importance, gains
<run>/wandb/                    a run for each trial (tuning/wandb_trials.py)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune as ray_tune
from ray.tune import Callback, PlacementGroupFactory, RunConfig, TuneConfig, Tuner
from ray.tune.logger import JsonLoggerCallback

from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.config.tune import Distribution
from exfm_ray.config.tune import TuneConfig as SweepConfig
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.runner import PipelineRunner
from exfm_ray.pipeline.schedule import Role
from exfm_ray.runtime.session import ray_session
from tuning.analysis import analyze
from tuning.console import show
from tuning.holdout import evaluate_holdout
from tuning.plots import write_plots
from tuning.results import Search, State, Trial, read_trials, write_trials
from tuning.rows import StudentRows
from tuning.search import FAILED, MEMBERS, MultiSearch, PerSearchASHA
from tuning.space import Space, as_settings
from tuning.trial import Figures, score
from tuning.trial_group import run_trial_group
from tuning.wandb_trials import TrialRuns

FOLDER = "tune"
RAY_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # they cost more than they are worth
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command at once
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output cannot be silenced
}


def tune(config: Config) -> None:
    """Run the FM and the DAS, the sweep, its holdout trainings and its analysis.

    Each step does only what is missing in the run's folder.
    """
    sweep = checked(config)
    stream = prepare_stream(config)
    check_windows(sweep, stream)
    folder = config.folder / FOLDER
    with ray_session(config), closing(TrialRuns(config)) as runs:
        run = PipelineRunner(config, stream)
        run.execute(frozenset({Role.FM, Role.DAS}))
        run.summarize()

        students = [
            student
            for student in config.vm.models
            if not sweep.students or student.name in sweep.students
        ]
        windows = range(sweep.holdout_windows[1] + 1)
        rows = {}
        for student in students:
            rows[student.name] = ray.put(StudentRows.read_from(config, student, windows))
        trials = search(config, sweep, students, rows, runs)
        results = evaluate_holdout(config, sweep, students, rows, trials, folder / "judged.json")

    summary = analyze(config, sweep, students, trials, results, folder)
    write_plots(sweep, trials, summary, folder / "plots.html")
    show(summary, folder)


def checked(config: Config) -> SweepConfig:
    """Return the config's sweep.

    Raises:
        UserError: the config has no sweep, or one that cannot run.
    """
    if config.tune is None:
        raise UserError("the config has no section 'tune'; configs/tune_demo.yaml shows one")
    if not config.vm.models:
        raise UserError("setting 'vm.models' is empty: a sweep needs students")
    if config.vm.device != "cpu":
        raise UserError(
            f"setting 'vm.device' is {config.vm.device}: trials run on the CPU; set vm.device=cpu"
        )
    return config.tune


def check_windows(sweep: SweepConfig, stream: EventStream) -> None:
    """Check that the stream has the windows of the sweep. Windows count from 0 without a gap.

    Raises:
        UserError: the stream ends before the last holdout window.
    """
    last = stream.windows()[-1]
    if sweep.holdout_windows[1] > last:
        raise UserError(
            f"setting 'tune.holdout_windows' is {list(sweep.holdout_windows)}: "
            f"the stream has windows 0 to {last}"
        )


def search(
    config: Config,
    sweep: SweepConfig,
    students: Sequence[StudentConfig],
    rows: Mapping[str, Any],
    runs: TrialRuns,
) -> list[Trial]:
    """Run the trials that are missing and return all trials. Needs a Ray session.

    Args:
        rows: student -> reference of its `StudentRows`.
        runs: writes each trial to wandb.
    """
    spaces = {
        Search(student.name, arm): Space(sweep.space_of(arm))
        for arm in sweep.arms
        for student in students
    }
    recorder = TrialRecorder(config.folder / FOLDER / "trials.parquet", sweep, spaces, runs)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searcher = MultiSearch(config, sweep, spaces, recorder.trials)
    if not searcher.left:
        return recorder.trials

    os.environ |= RAY_TUNE_ENVIRONMENT
    by_name = {student.name: student for student in students}
    trainable = ray_tune.with_parameters(
        run_trial_group, config=config, students=by_name, rows=dict(rows)
    )
    resources = PlacementGroupFactory([{"CPU": 1}], bundle_label_selector=[config.placement.vm])
    scheduler = None
    if sweep.early_stopping == "asha":
        scheduler = PerSearchASHA(sweep, spaces, recorder.trials)
    tune_config = TuneConfig(
        search_alg=searcher,
        scheduler=scheduler,
        num_samples=searcher.left,
        max_concurrent_trials=sweep.max_concurrent,
        reuse_actors=True,
    )
    run_config = RunConfig(
        name=time.strftime("%Y%m%d-%H%M%S"),
        storage_path=str(config.folder / "logs" / "ray_tune"),
        callbacks=[recorder, JsonLoggerCallback()],
        verbose=0,
    )
    trainable = ray_tune.with_resources(trainable, resources)
    Tuner(trainable, tune_config=tune_config, run_config=run_config).fit()
    return recorder.trials


class TrialRecorder(Callback):  # type: ignore[misc]  # ray has no types
    """Writes the trials of every trial group when it ends, and prints them to stderr."""

    def __init__(
        self,
        path: Path,
        sweep: SweepConfig,
        spaces: Mapping[Search, Space],
        runs: TrialRuns,
    ) -> None:
        self._path = path
        self._sweep = sweep
        self._runs = runs
        self._columns: dict[str, Distribution] = {}
        for space in spaces.values():
            self._columns |= space.distributions
        self._reports: dict[str, list[Any]] = {}
        self._seconds: dict[str, float] = {}
        self.trials = read_trials(path, self._columns)
        for trial in self.trials:
            runs.add(trial)

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        self._seconds[trial.trial_id] = result["time_total_s"]
        self._reports.setdefault(trial.trial_id, []).append(result[MEMBERS])

    def on_trial_complete(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        **info: Any,
    ) -> None:
        self._end(trial, None)

    def on_trial_error(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        **info: Any,
    ) -> None:
        """Record all members as failed, because their process has died."""
        last_line = Path(trial.error_file).read_text().strip().splitlines()[-1]
        self._end(trial, last_line)

    def _end(self, trial_group: Any, error: str | None) -> None:
        reports = self._reports.pop(trial_group.trial_id, [])
        seconds = self._seconds.pop(trial_group.trial_id, 0.0)
        members = trial_group.config[MEMBERS]
        ended = []
        for position, member in enumerate(members):
            entries = [report[position] for report in reports]
            trial = self._trial(trial_group.config, member, entries, seconds / len(members), error)
            ended.append(trial)

        self.trials += ended
        write_trials(self._path, self.trials, self._columns)
        for trial in ended:
            self._runs.add(trial)
            self._print(trial)

    def _print(self, trial: Trial) -> None:
        figures = trial.error
        if trial.state != "failed":
            last = trial.curve[-1]
            figures = f"NE {last.ne:.4f}, calibration {last.calibration:.3f}"
        student, arm = trial.search
        position = f"trial {trial.number + 1} of {self._sweep.trials}"
        print(f"{student} {arm} {position}: {trial.state}, {figures}", file=sys.stderr)

    def _trial(
        self,
        suggestion: Mapping[str, Any],
        member: Mapping[str, Any],
        entries: Sequence[Any],
        seconds: float,
        process_error: str | None,
    ) -> Trial:
        """Make the trial of a member from the entries that were reported on it."""
        good_entries = [entry for entry in entries if FAILED not in entry]
        reported_error = entries[-1].get(FAILED) if entries else "nothing was reported"
        error = process_error or reported_error
        curve = tuple(
            Figures(*(entry[field] for field in Figures._fields)) for entry in good_entries
        )
        settings = good_entries[-1]["settings"] if good_entries else member["settings"]
        return Trial(
            search=Search(suggestion["student"], suggestion["arm"]),
            number=member["number"],
            settings=as_settings(settings),
            state=self._state(curve, error),
            score=None if error else score(curve[-1], self._sweep.calibration),
            curve=curve,
            seconds=seconds,
            error=error,
        )

    def _state(self, curve: Sequence[Figures], error: str | None) -> State:
        if error:
            return "failed"
        _, last = self._sweep.validation_windows
        return "complete" if curve[-1].window == last else "stopped"
