"""Trials as runs in wandb: each once, whatever happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import small_config
from tuning_runs import SWEEP
from wandb_files import OfflineRun, content, run_files, surroundings

import tuning.wandb_trials
from exfm_ray.config.root import Config
from tuning.results import Search, State, Trial
from tuning.trial import Figures
from tuning.wandb_trials import TrialRuns

pytestmark = pytest.mark.heavy

IN = Figures(1, 0.75, 1.5, 1e6)
OUT = Figures(2, 0.5, 3.0, 1e6)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    surroundings(monkeypatch, tmp_path)


def config_of(
    folder: Path,
    mode: str = "offline",
    **changes: Any,
) -> Config:
    return small_config(folder, "sweep", tune=SWEEP, seed=5, wandb={"mode": mode}, **changes)


def trial(number: int, state: State = "complete") -> Trial:
    settings = {"distillation.ah.w": 0.3, "distillation.ah.mlp": (4,)}
    if state == "failed":
        return Trial(Search("feed", "ah"), number, settings, "failed", None, (), 0.25, "NaNs")
    return Trial(Search("feed", "ah"), number, settings, state, 2.4, (IN, OUT), 1.5)


def write(config: Config, *trials: Trial) -> None:
    runs = TrialRuns(config)
    for one in trials:
        runs.add(one)
    runs.close()


def names(config: Config) -> dict[str, OfflineRun]:
    found = [OfflineRun(path) for path in run_files(config.folder).values()]
    return {run.start["display_name"]: run for run in found}


def test_a_trial_is_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Wrong: trials cannot be found, compared or drawn over windows in wandb, or a failed one
    looks like a good one."""
    config = config_of(tmp_path)
    write(config, trial(7), trial(11, "failed"))
    found = names(config)
    assert found.keys() == {"feed ah 007", "feed ah 011"}
    run = found["feed ah 007"]
    failed = found["feed ah 011"]
    assert (run.start["run_group"], run.start["job_type"], run.start["project"]) == (
        "sweep/feed",
        "tune",
        "exfm-ray",
    )
    settings = {"distillation": {"ah": {"w": 0.3, "mlp": [4]}}}
    assert run.config == {**settings, "student": "feed", "arm": "ah", "trial": 7, "seed": 5}
    assert run.metrics == {"window": None, "*": "window"}
    # Calibration 1.5 is within [0.5, 2]; 3.0 is 1 out of it, less 1.96 standard errors: 3 /
    # sqrt(1e6) each.
    outside = 0.5 + 1 + (1 - 1.96 * 3 / 1000)
    points = [
        {"window": 1, "ne": 0.75, "calibration": 1.5, "score": 0.75},
        {"window": 2, "ne": 0.5, "calibration": 3.0, "score": outside},
    ]
    assert run.history == [pytest.approx(point) for point in points]
    assert run.summary == {
        "window": 2,
        "ne": 0.5,
        "calibration": 3.0,
        "state": "complete",
        "score": 2.4,
        "seconds": 1.5,
    }
    assert failed.history == [] and failed.summary == {
        "state": "failed",
        "seconds": 0.25,
        "error": "NaNs",
    }
    assert [one.exit[0]["exit_code"] for one in (run, failed)] == [0, 1]
    assert capfd.readouterr() == ("", "") and b"secret42" not in content(tmp_path)


def test_a_resumed_sweep_writes_what_is_missing(tmp_path: Path) -> None:
    """Wrong: a resumed sweep has the runs of its first part twice, or not those that a kill has
    cut off."""
    config = config_of(tmp_path)
    write(config, trial(0), trial(1))
    before = run_files(config.folder)
    write(config, trial(0), trial(1), trial(2))
    after = run_files(config.folder)
    assert before.items() <= after.items() and len(after) == 3
    write(config, trial(2), trial(0))
    assert run_files(config.folder) == after


def test_ids_are_of_the_trial(tmp_path: Path) -> None:
    """Wrong: two trials share a run in wandb, or one trial has a second run when its folder has
    moved or goes online."""
    config = config_of(tmp_path)
    other = Trial(Search("feed", "kd"), 0, {}, "complete", 0.5, (IN,), 1.0)
    ids = [tuning.wandb_trials.run_id(config, one) for one in (trial(0), trial(1), other)]
    ids.append(
        tuning.wandb_trials.run_id(
            config_of(tmp_path, distillation={"ah": {"beta": 2.0}}), trial(0)
        )
    )
    assert len(set(ids)) == 4
    assert (
        tuning.wandb_trials.run_id(config_of(tmp_path / "moved", "online"), trial(0, "stopped"))
        == ids[0]
    )


def test_disabled(tmp_path: Path) -> None:
    """Wrong: wandb writes files although it is disabled."""
    config = config_of(tmp_path, "disabled")
    write(config, trial(0))
    assert not list(tmp_path.rglob("*"))


def test_failure_of_wandb(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: a full disk or a dead server ends the sweep or fills the screen, or the missing
    runs are not reported or never written."""
    config = config_of(tmp_path)
    write_run = tuning.wandb_trials.write_run
    requested = []

    def failing(
        config: Config,
        one: Trial,
        identity: str,
    ) -> None:
        requested.append(one.number)
        if one.number == 1:
            raise OSError("no space left on device")
        write_run(config, one, identity)

    with monkeypatch.context() as patch:
        patch.setattr(tuning.wandb_trials, "write_run", failing)
        write(config, *(trial(number) for number in range(5)))
    message = capsys.readouterr().err
    assert (
        message.count("wandb") >= 1
        and len(message.splitlines()) == 1
        and "no space left" in message
        and "write the runs that are missing" in message
    )
    assert requested == [0, 1] and len(run_files(config.folder)) == 1
    write(config, *(trial(number) for number in range(5)))
    assert names(config).keys() == {f"feed ah 00{number}" for number in range(5)}
