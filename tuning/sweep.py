"""A sweep: trials of every student and arm, in blocks side by side under Ray Tune, from rows that
lie in the object store once.

<run>/tune/trials.parquet       every finished trial; a killed sweep goes on from it
<run>/tune/judged.json          the best and the untuned of each arm on the judge windows, seed by seed
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
from exfm_ray.config.tune import TuneConfig as SweepConfig
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.runner import PipelineRunner
from exfm_ray.runtime.session import ray_session
from tuning.analysis import analyse, show
from tuning.holdout import judge
from tuning.plots import write_plots
from tuning.results import Search, State, Trial, read_trials, write_trials
from tuning.rows import StudentRows
from tuning.search import FAILED, MEMBERS, MultiSearch, PerSearchASHA
from tuning.space import Space
from tuning.trial import Figures, score
from tuning.trial_group import as_settings, run_trial_group
from tuning.wandb_trials import TrialRuns

FOLDER = "tune"


def tune(config: Config) -> None:
    """FM and DAS where they have not run, the sweep, its judgement and analysis; each does only
    what is missing."""
    sweep = checked(config)
    stream = prepare_stream(config)
    check_windows(sweep, stream)
    with ray_session(config), closing(TrialRuns(config)) as runs:
        run = PipelineRunner(config, stream)
        run.execute(fm=True, das=True, vm=False)
        run.summarise()
        students = [s for s in config.vm.models if not sweep.students or s.name in sweep.students]
        rows = {
            s.name: ray.put(StudentRows.read_from(config, s, range(sweep.holdout_windows[1] + 1)))
            for s in students
        }
        trials = search(config, sweep, students, rows, runs)
        judged = judge(
            config, sweep, students, rows, trials, config.folder / FOLDER / "judged.json"
        )
    summary = analyse(config, sweep, students, trials, judged, config.folder / FOLDER)
    write_plots(sweep, trials, summary, config.folder / FOLDER / "plots.html")
    show(summary, config.folder / FOLDER)


def checked(config: Config) -> SweepConfig:
    """The config's sweep; UserError where it has none, or one that cannot run here."""
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
    """UserError where the stream does not have the windows of the sweep. Windows count from 0
    without a gap."""
    last = stream.windows()[-1]
    if sweep.holdout_windows[1] > last:
        raise UserError(
            f"setting 'tune.holdout_windows' is {list(sweep.holdout_windows)}: the stream has windows 0 to {last}"
        )


def search(
    config: Config,
    sweep: SweepConfig,
    students: Sequence[StudentConfig],
    rows: Mapping[str, Any],
    runs: TrialRuns,
) -> list[Trial]:
    """Run the trials that are missing; all trials. `rows`: student -> reference of its
    `StudentRows`. Needs a Ray session."""
    spaces = {
        Search(student.name, arm): Space(sweep.space_of(arm))
        for arm in sweep.arms
        for student in students
    }
    path = config.folder / FOLDER / "trials.parquet"
    recorder = TrialRecorder(path, sweep, spaces, runs)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searcher = MultiSearch(config, sweep, spaces, recorder.trials)
    if not searcher.left:
        return recorder.trials
    # Tune's own loggers cost more than they tell; Ctrl-C ends the command at once; its new output
    # cannot be silenced.
    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    trainable = ray_tune.with_parameters(
        run_trial_group, config=config, students={s.name: s for s in students}, rows=dict(rows)
    )
    Tuner(
        ray_tune.with_resources(
            trainable,
            PlacementGroupFactory([{"CPU": 1}], bundle_label_selector=[config.placement.vm]),
        ),
        tune_config=TuneConfig(
            search_alg=searcher,
            scheduler=PerSearchASHA(sweep, spaces, recorder.trials)
            if sweep.early_stopping == "asha"
            else None,
            num_samples=searcher.left,
            max_concurrent_trials=sweep.max_concurrent,
            reuse_actors=True,
        ),
        run_config=RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(config.folder / "logs" / "ray_tune"),
            callbacks=[recorder, JsonLoggerCallback()],
            verbose=0,
        ),
    ).fit()
    return recorder.trials


class TrialRecorder(Callback):  # type: ignore[misc]  # ray has no types
    """Writes the trials of every block as it ends, all at once, and says so on stderr."""

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
        self._columns = {
            name: d for space in spaces.values() for name, d in space.distributions.items()
        }
        self._reports: dict[str, list[Any]] = {}
        self._seconds: dict[str, float] = {}
        self.trials = read_trials(path, self._columns)
        for known in self.trials:
            runs.add(known)

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
        """Its process has died."""
        self._end(trial, Path(trial.error_file).read_text().strip().splitlines()[-1])

    def _end(self, block: Any, error: str | None) -> None:
        reports = self._reports.pop(block.trial_id, [])
        seconds = self._seconds.pop(block.trial_id, 0.0)
        members = block.config[MEMBERS]
        each = zip(
            members, ([report[i] for report in reports] for i in range(len(members))), strict=True
        )
        told = [
            self._trial(block.config, member, entries, seconds / len(members), error)
            for member, entries in each
        ]
        self.trials += told
        write_trials(self._path, self.trials, self._columns)
        for ended in told:
            self._runs.add(ended)
            last = ended.curve[-1] if ended.state != "failed" else None
            figures = (
                f"NE {last.ne:.4f}, calibration {last.calibration:.3f}" if last else ended.error
            )
            where = f"{ended.search.student} {ended.search.arm} trial {ended.number + 1} of {self._sweep.trials}"
            print(f"{where}: {ended.state}, {figures}", file=sys.stderr)

    def _trial(
        self,
        asked: Mapping[str, Any],
        member: Mapping[str, Any],
        entries: Sequence[Any],
        seconds: float,
        error: str | None,
    ) -> Trial:
        """A member, from the entries that were reported of it. `error`: of its process."""
        done = [entry for entry in entries if FAILED not in entry]
        error = error or (entries[-1].get(FAILED) if entries else "nothing was reported")
        curve = tuple(Figures(*(entry[field] for field in Figures._fields)) for entry in done)
        state: State = (
            "failed"
            if error
            else "complete"
            if curve[-1].window == self._sweep.validation_windows[1]
            else "stopped"
        )
        return Trial(
            search=Search(asked["student"], asked["arm"]),
            number=member["number"],
            settings=as_settings((done[-1] if done else member)["settings"]),
            state=state,
            score=None if error else score(curve[-1], self._sweep.calibration),
            curve=curve,
            seconds=seconds,
            error=error,
        )
