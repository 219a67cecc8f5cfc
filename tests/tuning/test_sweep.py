"""A whole sweep under Ray: killed, resumed, evaluated on the holdout windows; and its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dashboard_spec import logged, named
from small_runs import small_config
from tuning_runs import SWEEP, taught, trials
from wandb_files import OfflineRun, run_files
from workers import Workers

import tuning.sweep
from exfm_ray.config.load import load_config
from exfm_ray.config.root import Config
from exfm_ray.config.tune import Distribution, TuneConfig
from exfm_ray.data.prepare.prepare import source_schema
from exfm_ray.errors import UserError
from exfm_ray.tracking.dashboard import sections
from exfm_ray.tracking.recorder import read_metrics
from tuning.analysis import fm_ne
from tuning.holdout import best_trial
from tuning.results import Search, Trial, read_trials
from tuning.space import Space
from tuning.sweep import TrialRecorder
from tuning.trial import Figures, score
from tuning.trial_group import mean
from tuning.wandb_trials import run_id

W = "distillation.ah.w"

DIES_AFTER = 3
"""Trial groups that are written before the driver is killed."""


@dataclass
class Swept:
    config: Config
    before: list[Trial]
    trials: list[Trial]
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def swept(
    cluster: None,
    groups: dict[int, Workers],
    tmp_path_factory: pytest.TempPathFactory,
) -> Swept:
    """A sweep on labeled nodes whose driver dies after some trials, and the same command once
    more."""
    placement = {"vm": {"exfm-group": "tests"}}
    config = taught(
        groups,
        tmp_path_factory.mktemp("sweep"),
        tune=SWEEP,
        wandb={"mode": "offline"},
        placement=placement,
    )
    assert config.tune is not None
    columns = config.tune.space
    path = config.folder / "tune" / "trials.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning.sweep, "write_trials", dying(tuning.sweep.write_trials))
        with pytest.raises(KeyboardInterrupt):
            tuning.sweep.tune(config)
    before = read_trials(path, columns)
    tuning.sweep.tune(config)
    return Swept(
        config,
        before,
        read_trials(path, columns),
        json.loads((config.folder / "tune" / "summary.json").read_text()),
    )


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
    """Wrong: finished trials run again, some are missing, or an arm gets more trials than
    another."""
    assert DIES_AFTER < len(swept.before) < len(swept.trials)
    unchanged = [
        trial for trial in swept.trials if trial in swept.before
    ]  # their seconds too: they did not run again
    assert len(unchanged) == len(swept.before)
    searches = sorted((trial.search.arm, trial.number) for trial in swept.trials)
    assert searches == [(arm, number) for arm in ("ah", "kd", "labels") for number in (0, 1, 2)]


def test_failing_trials_are_recorded(swept: Swept) -> None:
    """Wrong: a trial that diverges ends the sweep or counts, or its error is lost."""
    for one in swept.trials:
        if one.search.arm == "kd":
            assert (
                (one.state, one.score) == ("failed", None)
                and one.error
                and ("diverged" in one.error or "NaN" in one.error)
            ), one.error
        else:
            assert one.state == "complete" and one.error is None and one.seconds > 0
    assert swept.summary["trials"] == {"complete": 6, "stopped": 0, "failed": 3}
    assert swept.summary["students"]["feed"]["arms"]["kd"]["best"] is None


def test_the_first_trial_is_the_config(swept: Swept) -> None:
    """Wrong: the tuned arm can be worse than the untuned one on the validation windows."""
    (first,) = (one for one in swept.trials if one.search.arm == "ah" and one.number == 0)
    assert first.settings == {
        "vm.optimizer.table_lr": 0.05,
        "distillation.ah.w": 1.0,
        "distillation.ah.mlp": (),
    }


def test_trials_under_ray_are_trials(swept: Swept, groups: dict[int, Workers]) -> None:
    """Wrong: rows in shared memory, a warm process or an earlier trial group in it change the
    figures, or a member gets a sibling's."""
    assert swept.config.tune is not None
    for arm, numbers in (("ah", (0, 1)), ("ah", (2,)), ("labels", (0, 1))):
        members = [
            one
            for number in numbers
            for one in swept.trials
            if (one.search.arm, one.number) == (arm, number)
        ]
        (told,) = groups[1].run(
            trials, swept.config, "feed", arm, [one.settings for one in members], 1, 2, 2
        )
        for i, one in enumerate(members):
            assert list(one.curve) == [mean(outcomes[2 * i : 2 * i + 2]) for outcomes in told]
            assert one.score == score(one.curve[-1], swept.config.tune.calibration)
    structures = {
        one.settings["distillation.ah.mlp"]
        for one in swept.trials
        if one.search.arm == "ah" and one.number < 2
    }
    assert structures == {()}  # of the config, which is the first


def test_judged_on_later_windows(swept: Swept, groups: dict[int, Workers]) -> None:
    """Wrong: the gain is of windows that chose the settings, of one seed, or of other settings
    than the best ones."""
    best = best_trial(swept.trials, Search("feed", "ah"))
    assert best is not None
    judged = json.loads((swept.config.folder / "tune" / "judged.json").read_text())
    assert len(judged) == 2 * (2 + 2 + 1)  # seeds, and of kd only the untuned one
    (one,) = (j for j in judged if (j["arm"], j["variant"], j["seed"]) == ("ah", "tuned", 0))
    (((figures, _),),) = groups[1].run(trials, swept.config, "feed", "ah", [best.settings], 3, 3, 2)
    assert (figures.window, figures.ne, figures.calibration) == (3, one["ne"], one["calibration"])
    told = swept.summary["students"]["feed"]["arms"]
    labels = {j["seed"]: j["ne"] for j in judged if (j["arm"], j["variant"]) == ("labels", "tuned")}
    gains = [
        (labels[j["seed"]] - j["ne"]) / labels[j["seed"]]
        for j in judged
        if (j["arm"], j["variant"]) == ("ah", "tuned")
    ]
    assert told["ah"]["tuned"]["ne_gain"]["mean"] == pytest.approx(sum(gains) / 2, rel=1e-9)
    assert told["labels"]["tuned"]["ne_gain"] is None


def test_population(
    cluster: None,
    groups: dict[int, Workers],
    tmp_path: Path,
) -> None:
    """Wrong: a population ends in an error, leaves its space, or no member copies a better one."""
    population = {
        **SWEEP,
        "search": "pbt",
        "trials_per_process": 4,
        "trials": 4,
        "seeds": 1,
        "judge_seeds": 1,
        "arms": ["labels"],
        "max_concurrent": 1,
    }
    config = taught(groups, tmp_path, tune=population)
    tuning.sweep.tune(config)
    assert config.tune is not None
    found = read_trials(config.folder / "tune" / "trials.parquet", config.tune.space_of("labels"))
    assert [(one.number, one.state, len(one.curve)) for one in found] == [
        (number, "complete", 2) for number in range(4)
    ]
    rates = [one.settings["vm.optimizer.table_lr"] for one in found]
    assert all(isinstance(rate, float) and 0.01 <= rate <= 0.2 for rate in rates)
    first = [one.curve[0].ne for one in found]
    best = first.index(min(first))
    worst = first.index(max(first))
    assert rates[worst] in [max(0.01, min(0.2, rates[best] * factor)) for factor in (0.8, 1.25)]  # type: ignore[operator]
    assert found[worst].curve[1].ne != found[best].curve[1].ne


def recorded(path: Path) -> tuple[TrialRecorder, SimpleNamespace, list[dict[str, Any]]]:
    """A recorder, a trial group of two members, and its reports: the second member diverges in
    its second window."""
    tune = TuneConfig(
        score_windows=(1, 2), judge_windows=(3, 3), space={W: Distribution(low=0, high=2)}, trials=2
    )
    members = [{"number": number, "settings": {W: w}} for number, w in enumerate((0.5, 1.0))]
    trial_group = SimpleNamespace(
        trial_id="x",
        config={"student": "s", "arm": "ah", "members": members},
        error_file=path.parent / "error.txt",
    )
    trial_group.error_file.write_text("Traceback\nThe actor is dead.\n")
    entries = [
        [
            {**Figures(1, ne, 1.0, 40.0)._asdict(), "score": ne, "settings": {W: w}}
            for ne, w in ((0.8, 0.5), (0.9, 1.0))
        ],
        [
            {**Figures(2, 0.7, 1.1, 90.0)._asdict(), "score": 1.0, "settings": {W: 0.4}},
            {"failed": "diverged"},
        ],
    ]
    reports = [{"members": one, "time_total_s": 3.0 * i} for i, one in enumerate(entries, 1)]
    runs: Any = SimpleNamespace(add=lambda trial: None)
    return (
        TrialRecorder(path, tune, {Search("s", "ah"): Space(tune.space)}, runs),
        trial_group,
        reports,
    )


def test_each_member_is_written(tmp_path: Path) -> None:
    """Wrong: a member is written with a sibling's curve or the settings of an earlier window, or
    a failed one as complete."""
    recorder, trial_group, reports = recorded(tmp_path / "trials.parquet")
    for report in reports:
        recorder.on_trial_result(0, [], trial_group, report)
    recorder.on_trial_complete(0, [], trial_group)
    whole, failed = read_trials(tmp_path / "trials.parquet", {W: Distribution(low=0, high=2)})
    assert (whole.number, whole.state, whole.settings, whole.seconds, whole.error) == (
        0,
        "complete",
        {W: 0.4},
        3.0,
        None,
    )
    assert (
        whole.curve == (Figures(1, 0.8, 1.0, 40.0), Figures(2, 0.7, 1.1, 90.0))
        and whole.score == 0.7
    )  # 0.05 too far, but 90 labels
    assert (failed.number, failed.state, failed.score, failed.error, failed.settings) == (
        1,
        "failed",
        None,
        "diverged",
        {W: 1.0},
    )
    assert failed.curve == (Figures(1, 0.9, 1.0, 40.0),)


@pytest.mark.parametrize("reported", [0, 1])
def test_a_dead_process_fails_all_its_members(tmp_path: Path, reported: int) -> None:
    """Wrong: a member whose process died counts as stopped early, is lost, or is trained again
    forever."""
    recorder, trial_group, reports = recorded(tmp_path / "trials.parquet")
    for report in reports[:reported]:
        recorder.on_trial_result(0, [], trial_group, report)
    recorder.on_trial_error(0, [], trial_group)
    found = [
        (one.number, one.state, one.error, one.score, len(one.curve)) for one in recorder.trials
    ]
    assert found == [(number, "failed", "The actor is dead.", None, reported) for number in (0, 1)]


def test_figures_of_the_fm(swept: Swept) -> None:
    """Wrong: the students are compared with the FM on other examples."""
    rows = read_metrics(swept.config.folder / "metrics.jsonl")
    (row,) = (
        r
        for r in rows
        if (r["role"], r["domain"], r["task"], r["window"]) == ("fm", "feed", "click", 3)
    )
    assert (
        fm_ne(swept.config, swept.config.vm.models[0], (3, 3))
        == swept.summary["students"]["feed"]["fm_ne"]
        == pytest.approx(row["ne"], rel=1e-12)
    )


def test_best_config_is_a_config(swept: Swept) -> None:
    """Wrong: `run.py pipeline` refuses the sweep's config, or it is not the one that won."""
    best = best_trial(swept.trials, Search("feed", "ah"))
    assert best is not None
    config = load_config(swept.config.folder / "tune" / "best" / "feed.yaml")
    assert (
        config.vm.arms == ("labels", "ah")
        and [s.name for s in config.vm.models] == ["feed"]
        and config.tune is None
    )
    assert (
        config.distillation.ah.w == best.settings["distillation.ah.w"]
        and config.fm == swept.config.fm
    )


def test_nothing_left_to_do(swept: Swept) -> None:
    """Wrong: a finished sweep trains again, or ends with other figures."""
    files = {
        name: (swept.config.folder / "tune" / name).read_bytes()
        for name in ("trials.parquet", "judged.json", "summary.json")
    }
    tuning.sweep.tune(swept.config)
    assert files == {name: (swept.config.folder / "tune" / name).read_bytes() for name in files}


def test_runs_and_plots(swept: Swept) -> None:
    """Wrong: trials that finished before or after a kill are missing in wandb or written twice,
    nothing is drawn, or the dashboard shows what no trial has."""
    found = run_files(swept.config.folder)
    assert found.keys() == {run_id(swept.config, one) for one in swept.trials}
    (part,) = [
        section
        for section in sections(swept.config, source_schema(swept.config))
        if section.name == "Sweep"
    ]
    had = logged(
        [
            OfflineRun(found[run_id(swept.config, one)])
            for one in swept.trials
            if one.search.arm == "ah" or one.state == "failed"
        ]
    )
    for panel in part.panels:
        asked = named(
            json.loads(panel._to_model().model_dump_json(by_alias=True, exclude_none=True))
        )
        assert asked and asked <= had, asked - had
    assert (
        f"trials-0-{len(SWEEP['space']) - 1}"
        in (swept.config.folder / "tune" / "plots.html").read_text()
    )


def test_another_config_is_refused(swept: Swept) -> None:
    """Wrong: trials of two spaces or of two students' settings are in one file."""
    assert swept.config.tune is not None
    other = swept.config.model_copy(
        update={"tune": swept.config.tune.model_copy(update={"trials": 5})}
    )
    with pytest.raises(UserError, match="this folder holds a run with other settings"):
        tuning.sweep.tune(other)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no sweep": ({"tune": None}, "the config has no section 'tune'"),
    "no students": (
        {"vm": {"models": []}, "tune": {**SWEEP, "students": []}},
        "setting 'vm.models' is empty",
    ),
    "cuda": ({"vm": {"device": "cuda"}, "tune": SWEEP}, "set vm.device=cpu"),
    "windows": (
        {"tune": {**SWEEP, "holdout_windows": [3, 9]}},
        r"setting 'tune.holdout_windows' is \[3, 9\]: the stream has windows 0 to 3",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path: Path, name: str) -> None:
    """Wrong: hours of FM training pass before a sweep that cannot run is refused."""
    changes, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        tuning.sweep.tune(small_config(tmp_path, "bad", **changes))
    assert not list((tmp_path / "bad").glob("checkpoints"))
