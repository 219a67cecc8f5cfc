"""A sweep: trials of every student and arm, side by side under Ray Tune, from rows that lie in the object store once.

    <run>/tune/trials.parquet       every finished trial; a killed sweep goes on from it
    <run>/tune/judged.json          the best and the untuned of each arm on the judge windows, seed by seed
    <run>/tune/best/<student>.yaml  a config for `run.py pipeline`
    <run>/tune/summary.json         figures, gains, importance of the settings
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune as ray_tune
from ray.tune import Callback, RunConfig, TuneConfig, Tuner
from ray.tune.logger import JsonLoggerCallback

from exfm_ray.config import Config, StudentConfig
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.pipeline import Run, prepare_stream
from exfm_ray.runtime import ray_session
from exfm_ray.tune_config import Settings
from exfm_ray.tune_config import TuneConfig as SweepConfig
from tuning.analysis import analyse, show
from tuning.judge import judge
from tuning.results import Search, State, Trial, read_trials, write_trials
from tuning.rows import StudentRows
from tuning.search import FAILED, SCORE, Halving, Searches
from tuning.space import Space
from tuning.trial import Figures, learn, score, trial_job

FOLDER = "tune"


def tune(config: Config) -> None:
    """FM and DAS where they have not run, the sweep, its judgement and analysis; each does only what is missing."""
    sweep = checked(config)
    stream = prepare_stream(config)
    check_windows(sweep, stream)
    with ray_session(config):
        run = Run(config, stream)
        run.execute(fm=True, das=True, vm=False)
        run.summarise()
        students = [s for s in config.vm.models if not sweep.students or s.name in sweep.students]
        rows = {s.name: ray.put(StudentRows.read_from(config, s, range(sweep.judge_windows[1] + 1))) for s in students}
        trials = search(config, sweep, students, rows)
        judged = judge(config, sweep, students, rows, trials, config.folder / FOLDER / "judged.json")
    show(analyse(config, sweep, students, trials, judged, config.folder / FOLDER), config.folder / FOLDER)


def checked(config: Config) -> SweepConfig:
    """The config's sweep; UserError where it has none, or one that cannot run here."""
    if config.tune is None:
        raise UserError("the config has no section 'tune'; configs/tune_demo.yaml shows one")
    if not config.vm.models:
        raise UserError("setting 'vm.models' is empty: a sweep needs students")
    if config.vm.device != "cpu":
        raise UserError(f"setting 'vm.device' is {config.vm.device}: trials run on the CPU; set vm.device=cpu")
    return config.tune


def check_windows(sweep: SweepConfig, stream: EventStream) -> None:
    """UserError where the stream does not have the windows of the sweep. Windows count from 0 without a gap."""
    last = stream.windows()[-1]
    if sweep.judge_windows[1] > last:
        raise UserError(f"setting 'tune.judge_windows' is {list(sweep.judge_windows)}: the stream has windows 0 to {last}")


def search(config: Config, sweep: SweepConfig, students: Sequence[StudentConfig], rows: Mapping[str, Any]) -> list[Trial]:
    """Run the trials that are missing; all trials. `rows`: student -> reference of its `StudentRows`. Needs a Ray session."""
    spaces = {Search(student.name, arm): Space(sweep.space_of(arm)) for arm in sweep.arms for student in students}
    path = config.folder / FOLDER / "trials.parquet"
    recorder = Recorder(path, sweep, spaces)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searcher = Searches(config, sweep, spaces, recorder.trials)
    if not searcher.left:
        return recorder.trials
    # Tune's own loggers cost more than they tell; Ctrl-C ends the command at once; its new output cannot be silenced.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    trainable = ray_tune.with_parameters(run_trial, config=config, students={s.name: s for s in students}, rows=dict(rows))
    Tuner(
        ray_tune.with_resources(trainable, {"cpu": 1}),
        tune_config=TuneConfig(
            search_alg=searcher, scheduler=Halving(sweep, spaces, recorder.trials) if sweep.early_stopping == "asha" else None,
            num_samples=searcher.left, max_concurrent_trials=sweep.concurrent, reuse_actors=True,
        ),
        run_config=RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"), storage_path=str(config.folder / "logs" / "ray_tune"), callbacks=[recorder, JsonLoggerCallback()],
            verbose=0,
        ),
    ).fit()  # fmt: skip
    return recorder.trials


def run_trial(asked: dict[str, Any], config: Config, students: Mapping[str, StudentConfig], rows: Mapping[str, Any]) -> None:
    """What a trial's process runs; reports after each score window, or that the trial has failed."""
    assert config.tune is not None
    first, last = config.tune.score_windows
    try:
        job = trial_job(config, students[asked["student"]], asked["arm"], asked["settings"], first)
        for figures, _ in learn(job, ray.get(rows[asked["student"]]), range(last + 1)):
            if figures:
                ray_tune.report({**figures._asdict(), SCORE: score(figures, config.tune.calibration)})
    except Exception as error:
        ray_tune.report({FAILED: f"{type(error).__name__}: {error}", SCORE: math.inf})


class Recorder(Callback):  # type: ignore[misc]  # ray has no types
    """Writes every trial as it ends, and says so on stderr."""

    def __init__(self, path: Path, sweep: SweepConfig, spaces: Mapping[Search, Space]) -> None:
        self._path, self._sweep = path, sweep
        self._columns = {name: d for space in spaces.values() for name, d in space.distributions.items()}
        self._curves: dict[str, list[Figures]] = {}
        self._seconds: dict[str, float] = {}
        self._errors: dict[str, str] = {}
        self.trials = read_trials(path, self._columns)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._seconds[trial.trial_id] = result["time_total_s"]
        if FAILED in result:
            self._errors[trial.trial_id] = result[FAILED]
            return
        figures = Figures(result["window"], result["ne"], result["calibration"])
        self._curves.setdefault(trial.trial_id, []).append(figures)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, self._errors.pop(trial.trial_id, None))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process has died."""
        self._end(trial, Path(trial.error_file).read_text().strip().splitlines()[-1])

    def _end(self, trial: Any, error: str | None) -> None:
        curve, settings = tuple(self._curves.pop(trial.trial_id, ())), trial.config["settings"]
        last = curve[-1] if curve and not error else None
        state: State = "failed" if last is None else "complete" if last.window == self._sweep.score_windows[1] else "stopped"
        ended = Trial(
            search=Search(trial.config["student"], trial.config["arm"]), number=trial.config["number"], settings=_settings(settings), state=state,
            score=score(last, self._sweep.calibration) if last else None, curve=curve, seconds=self._seconds.pop(trial.trial_id, 0.0), error=error,
        )  # fmt: skip
        self.trials.append(ended)
        write_trials(self._path, self.trials, self._columns)
        told = f"NE {last.ne:.4f}, calibration {last.calibration:.3f}" if last else error
        print(f"{ended.search.student} {ended.search.arm} trial {ended.number + 1} of {self._sweep.trials}: {state}, {told}", file=sys.stderr)


def _settings(asked: Mapping[str, Any]) -> Settings:
    """Settings as Tune gives them back, lists as tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()}
