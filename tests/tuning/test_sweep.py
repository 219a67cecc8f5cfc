"""A whole sweep under Ray: killed, taken up again, judged; what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_config
from tuning_runs import SWEEP, taught, trial
from workers import Workers

import tuning.sweep
from exfm_ray.config import Config, load_config
from exfm_ray.errors import UserError
from exfm_ray.tracking.recorder import read_metrics
from tuning.analysis import fm_ne
from tuning.judge import best_trial
from tuning.results import Search, Trial, read_trials
from tuning.trial import score

DIES_AFTER = 3


@dataclass
class Swept:
    config: Config
    before: list[Trial]
    trials: list[Trial]
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def swept(cluster: None, groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A sweep whose driver dies after some trials, and the same command once more."""
    config = taught(groups, tmp_path_factory.mktemp("sweep"), tune=SWEEP)
    assert config.tune is not None
    columns = config.tune.space
    path = config.folder / "tune" / "trials.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning.sweep, "write_trials", dying(tuning.sweep.write_trials))
        with pytest.raises(KeyboardInterrupt):
            tuning.sweep.tune(config)
    before = read_trials(path, columns)
    tuning.sweep.tune(config)
    return Swept(config, before, read_trials(path, columns), json.loads((config.folder / "tune" / "summary.json").read_text()))


def dying(write: Callable[..., None]) -> Callable[..., None]:
    """Writes some times, and then the driver is killed."""
    written = 0

    def one(*arguments: Any) -> None:
        nonlocal written
        write(*arguments)
        written += 1
        if written == DIES_AFTER:
            raise KeyboardInterrupt

    return one


def test_a_killed_sweep_goes_on(swept: Swept) -> None:
    """Wrong: finished trials run again, or some are missing, or an arm gets more trials than another."""
    assert len(swept.before) == DIES_AFTER
    kept = [trial for trial in swept.trials if trial in swept.before]  # their seconds too: they did not run again
    assert len(kept) == DIES_AFTER
    searches = sorted((trial.search.arm, trial.number) for trial in swept.trials)
    assert searches == [(arm, number) for arm in ("ah", "kd", "labels") for number in (0, 1)]


def test_failing_trials_are_recorded(swept: Swept) -> None:
    """Wrong: a trial that diverges ends the sweep, or is counted, or nobody learns why."""
    for one in swept.trials:
        if one.search.arm == "kd":
            assert (one.state, one.score) == ("failed", None) and one.error and ("diverged" in one.error or "NaN" in one.error), one.error
        else:
            assert one.state == "complete" and one.error is None and one.seconds > 0
    assert swept.summary["trials"] == {"complete": 4, "stopped": 0, "failed": 2}
    assert swept.summary["students"]["feed"]["arms"]["kd"]["best"] is None


def test_the_first_trial_is_the_config(swept: Swept) -> None:
    """Wrong: the tuned arm can be worse than the untuned one on the windows that chose."""
    (first,) = (one for one in swept.trials if one.search.arm == "ah" and one.number == 0)
    assert first.settings == {"vm.optimizer.table_lr": 0.05, "distillation.ah.w": 1.0, "distillation.ah.mlp": ()}


def test_trials_under_ray_are_trials(swept: Swept, groups: dict[int, Workers]) -> None:
    """Wrong: rows in shared memory, a warm process or another trial in it before change the figures."""
    assert swept.config.tune is not None
    for one in (one for one in swept.trials if one.state == "complete"):
        ((figures, _),) = groups[1].run(trial, swept.config, "feed", one.search.arm, one.settings, 1, 2)
        assert list(one.curve) == figures and one.score == score(figures[-1], swept.config.tune.calibration)


def test_judged_on_later_windows(swept: Swept, groups: dict[int, Workers]) -> None:
    """Wrong: the gain is told of windows that chose the settings, of one seed, or of other settings than the best ones."""
    best = best_trial(swept.trials, Search("feed", "ah"))
    assert best is not None
    judged = json.loads((swept.config.folder / "tune" / "judged.json").read_text())
    assert len(judged) == 2 * (2 + 2 + 1)  # seeds, and of kd only the untuned one
    (one,) = (j for j in judged if (j["arm"], j["variant"], j["seed"]) == ("ah", "tuned", 0))
    ((figures, _),) = groups[1].run(trial, swept.config, "feed", "ah", best.settings, 3, 3)
    assert [(f.window, f.ne, f.calibration) for f in figures] == [(3, one["ne"], one["calibration"])]
    told = swept.summary["students"]["feed"]["arms"]
    labels = {j["seed"]: j["ne"] for j in judged if (j["arm"], j["variant"]) == ("labels", "tuned")}
    gains = [(labels[j["seed"]] - j["ne"]) / labels[j["seed"]] for j in judged if (j["arm"], j["variant"]) == ("ah", "tuned")]
    assert told["ah"]["tuned"]["ne_gain"]["mean"] == pytest.approx(sum(gains) / 2, rel=1e-9)
    assert told["labels"]["tuned"]["ne_gain"] is None


def test_figures_of_the_fm(swept: Swept) -> None:
    """Wrong: the students are compared with the FM on other examples."""
    rows = read_metrics(swept.config.folder / "metrics.jsonl")
    (row,) = (r for r in rows if (r["role"], r["domain"], r["task"], r["window"]) == ("fm", "feed", "click", 3))
    assert fm_ne(swept.config, swept.config.vm.models[0], (3, 3)) == swept.summary["students"]["feed"]["fm_ne"] == pytest.approx(row["ne"], rel=1e-12)


def test_best_config_is_a_config(swept: Swept) -> None:
    """Wrong: what the sweep hands on is refused by `run.py pipeline`, or is not what won."""
    best = best_trial(swept.trials, Search("feed", "ah"))
    assert best is not None
    config = load_config(swept.config.folder / "tune" / "best" / "feed.yaml")
    assert config.vm.arms == ("labels", "ah") and [s.name for s in config.vm.models] == ["feed"] and config.tune is None
    assert config.distillation.ah.w == best.settings["distillation.ah.w"] and config.fm == swept.config.fm


def test_nothing_left_to_do(swept: Swept) -> None:
    """Wrong: a finished sweep trains again, or ends with other figures."""
    files = {name: (swept.config.folder / "tune" / name).read_bytes() for name in ("trials.parquet", "judged.json", "summary.json")}
    tuning.sweep.tune(swept.config)
    assert files == {name: (swept.config.folder / "tune" / name).read_bytes() for name in files}


def test_another_config_is_refused(swept: Swept) -> None:
    """Wrong: trials of two spaces or of two students' settings stand in one file."""
    assert swept.config.tune is not None
    other = swept.config.model_copy(update={"tune": swept.config.tune.model_copy(update={"trials": 5})})
    with pytest.raises(UserError, match="this folder holds a run with other settings"):
        tuning.sweep.tune(other)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no sweep": ({"tune": None}, "the config has no section 'tune'"),
    "no students": ({"vm": {"models": []}, "tune": {**SWEEP, "students": []}}, "setting 'vm.models' is empty"),
    "cuda": ({"vm": {"device": "cuda"}, "tune": SWEEP}, "set vm.device=cpu"),
    "windows": ({"tune": {**SWEEP, "judge_windows": [3, 9]}}, r"setting 'tune.judge_windows' is \[3, 9\]: the stream has windows 0 to 3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path: Path, name: str) -> None:
    """Wrong: hours of FM training pass before a sweep that cannot run is refused."""
    changes, told = MISTAKES[name]
    with pytest.raises(UserError, match=told):
        tuning.sweep.tune(small_config(tmp_path, "bad", **changes))
    assert not list((tmp_path / "bad").glob("checkpoints"))
