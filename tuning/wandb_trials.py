"""Every finished trial as a run in wandb.

A thread writes the runs: one takes about 20 ms, the first one a second, and a server may take
longer than a trial. The file <run>/wandb/trials.json holds the ids of the runs that are written, so
that a resumed sweep writes only the missing ones.
"""

from __future__ import annotations

import sys
from queue import SimpleQueue
from threading import Thread

from exfm_ray.config.root import Config
from exfm_ray.config.tree import set_dotted
from exfm_ray.storage.atomic import read_json, short_hash, write_json
from exfm_ray.tracking.wandb_session import close_wandb, open_run
from tuning.results import Trial
from tuning.trial import score


class TrialRuns:
    """Writes a run for each trial, once. An error in wandb ends the writing, not the sweep."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._path = config.folder / "wandb" / "trials.json"
        self._queue: SimpleQueue[Trial | None] = SimpleQueue()
        self._thread = Thread(target=self._write_all, daemon=True, name="wandb")
        if config.wandb.mode != "disabled":
            self._thread.start()

    def add(self, trial: Trial) -> None:
        """Queue the trial, whose run is written in the background."""
        if self._thread.is_alive():
            self._queue.put(trial)

    def close(self) -> None:
        """Wait until all queued trials are written."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def __getstate__(self) -> None:
        """Pickle nothing: Tune pickles its callbacks, but a sweep resumes from its own files."""

    def _write_all(self) -> None:
        try:
            self._write_missing()
        except Exception as error:
            print(
                f"wandb: {type(error).__name__}: {error}. The sweep continues without wandb; "
                "rerun the same command to write the runs that are missing",
                file=sys.stderr,
            )

    def _write_missing(self) -> None:
        """Write the queued trials that have no run yet, until `close`."""
        written: list[str] | None = None
        is_open = False
        while trial := self._queue.get():
            if written is None:
                written = read_json(self._path) if self._path.exists() else []
            identity = run_id(self._config, trial)
            if identity in written:
                continue
            is_open = True
            write_run(self._config, trial, identity)
            written.append(identity)
            write_json(self._path, written)
        if is_open:
            close_wandb()


def run_id(config: Config, trial: Trial) -> str:
    """Return an id that depends on the trial and the config, but not on the run's folder."""
    settings = config.model_dump(mode="json", exclude={"run", "wandb"})
    return short_hash([config.name, settings, *trial.search, trial.number])


def write_run(
    config: Config,
    trial: Trial,
    identity: str,
) -> None:
    """Write a whole run: settings, the figures of each validation window, how the trial ended."""
    assert config.tune is not None
    student, arm = trial.search
    settings: dict[str, object] = {
        "student": student,
        "arm": arm,
        "trial": trial.number,
        "seed": config.seed,
    }
    for setting, value in trial.settings.items():
        set_dotted(settings, setting, value)  # nested: wandb reads a dot as a step into a section

    name = f"{student} {arm} {trial.number:03d}"
    group = f"{config.name}/{student}"
    run = open_run(config, identity, name, group, "tune", settings, step="window")
    for figures in trial.curve:
        row = {
            "window": figures.window,
            "ne": figures.ne,
            "calibration": figures.calibration,
            "score": score(figures, config.tune.calibration),
        }
        run.log(row)

    ended = {
        "state": trial.state,
        "score": trial.score,
        "seconds": trial.seconds,
        "error": trial.error,
    }
    run.summary.update({key: value for key, value in ended.items() if value is not None})
    run.finish(exit_code=1 if trial.state == "failed" else 0)
