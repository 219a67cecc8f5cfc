"""Every finished trial as a run in wandb.

Written by a thread: a run takes some 20 ms, the first one a second, and a server may take longer
than a trial. The file <run>/wandb/trials.json holds the ids of the runs that are written, so that a
sweep that goes on writes those that are missing.
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
    """Writes the runs of the trials that it is given, each once. What fails in wandb ends the
    writing, not the sweep."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._path = config.folder / "wandb" / "trials.json"
        self._queue: SimpleQueue[Trial | None] = SimpleQueue()
        self._thread = Thread(target=self._write_all, daemon=True, name="wandb")
        if config.wandb.mode != "disabled":
            self._thread.start()

    def add(self, trial: Trial) -> None:
        """Write the trial's run, soon."""
        if self._thread.is_alive():
            self._queue.put(trial)

    def close(self) -> None:
        """Wait until all is written."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def __getstate__(self) -> None:
        """Nothing: Tune pickles its callbacks and all they hold, but a sweep goes on from its own
        files."""

    def _write_all(self) -> None:
        written: list[str] | None = None
        opened = False
        try:
            while trial := self._queue.get():
                if written is None:
                    written = read_json(self._path) if self._path.exists() else []
                identity = run_id(self._config, trial)
                if identity not in written:
                    opened = True
                    write_run(self._config, trial, identity)
                    written.append(identity)
                    write_json(self._path, written)
            if opened:
                close_wandb()
        except Exception as error:
            told = f"wandb: {type(error).__name__}: {error}"
            print(
                f"{told}. The sweep goes on without wandb; the same command, given again, writes the runs that are missing",
                file=sys.stderr,
            )


def run_id(config: Config, trial: Trial) -> str:
    """The same for the same trial of the same config, wherever it is kept."""
    return short_hash(
        [
            config.name,
            config.model_dump(mode="json", exclude={"run", "wandb"}),
            *trial.search,
            trial.number,
        ]
    )


def write_run(
    config: Config,
    trial: Trial,
    identity: str,
) -> None:
    """A whole run: settings, NE, calibration and score along the score windows, and how the trial
    ended."""
    assert config.tune is not None
    student, arm = trial.search
    settings: dict[str, object] = {
        "student": student,
        "arm": arm,
        "trial": trial.number,
        "seed": config.seed,
    }
    for setting, value in trial.settings.items():
        set_dotted(settings, setting, value)  # nested: wandb takes a dot for a step into a section
    run = open_run(
        config,
        identity,
        f"{student} {arm} {trial.number:03d}",
        f"{config.name}/{student}",
        "tune",
        settings,
        step="window",
    )
    for figures in trial.curve:
        bounded = score(figures, config.tune.calibration)
        run.log(
            {
                "window": figures.window,
                "ne": figures.ne,
                "calibration": figures.calibration,
                "score": bounded,
            }
        )
    ended = {
        "state": trial.state,
        "score": trial.score,
        "seconds": trial.seconds,
        "error": trial.error,
    }
    run.summary.update({key: value for key, value in ended.items() if value is not None})
    run.finish(exit_code=1 if trial.state == "failed" else 0)
