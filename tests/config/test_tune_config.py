"""The `tune` section: mistakes are reported when the config is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from exfm_ray.config.checks import with_settings
from exfm_ray.config.load import dump_config, load_config
from exfm_ray.config.root import Config
from exfm_ray.errors import UserError

GOOD = {"validation_windows": [1, 2], "holdout_windows": [3, 4]}
W = "distillation.ah.w"
SA_W = "distillation.sa.w"
SA_LR = "distillation.sa.lr"
SA_MLP = "distillation.sa.mlp"
RANGE = {"low": 1, "high": 2}
PBT: dict[str, object] = {
    "search": "pbt",
    "trials_per_process": 4,
    "trials": 8,
    "early_stopping": "none",
}
SPACES = {
    "typo": (
        {"distillation.ah.wt": RANGE},
        r"tune.space: unknown setting 'distillation.ah.wt'. Did you mean 'distillation.ah.w'\?",
    ),
    "not searchable": ({"fm.batch_size": RANGE}, r"unknown setting 'fm.batch_size'"),
    "nothing near": (
        {"zzz": RANGE},
        r"unknown setting 'zzz'. A sweep may search distillation.kd.w, ",
    ),
    "history": (
        {"distillation.history.dim": RANGE},
        r"'distillation.history.dim' cannot be searched: the DAS .* before the sweep begins",
    ),
    "history's layer": (
        {"distillation.history.layer": {"choice": ["backbone"]}},
        r"'distillation.history.layer' cannot be searched",
    ),
    "history, typo": (
        {"distillation.history.dims": RANGE},
        r"unknown setting 'distillation.history.dims'",
    ),
    "projection": (
        {"distillation.share.projection": {"choice": ["none"]}},
        r"'distillation.share.projection' cannot be searched: rows of the same width",
    ),
    "no tables": (
        {"distillation.share.tables": {"choice": ["user"]}},
        r"tune.space: setting 'distillation.share.tables'",
    ),
    "value": (
        {W: {"low": -1, "high": 1}},
        r"tune.space: setting 'distillation.ah.w': .*greater than or equal to 0",
    ),
    "choice": (
        {"distillation.sa.input": {"choice": ["logit", "lo"]}},
        r"tune.space: setting 'distillation.sa.input': .*'lo'",
    ),
    "order of ends": (
        {W: {"low": 2, "high": 1}},
        r"tune.space.distillation.ah.w': low is 2, which is not below high = 1",
    ),
    "log": ({W: {"low": 0, "high": 1, "log": True}}, r"log is set with low = 0"),
    "integer": ({"vm.batch_size": {"low": 1.5, "high": 4, "integer": True}}, r"set whole numbers"),
    "both": ({W: {**RANGE, "choice": [1]}}, r"set low and high, or a choice, not both"),
    "neither": ({W: {"low": 0}}, r"set low and high, or a choice"),
    "twice": ({W: {"choice": [1, 2, 1]}}, r"names a value twice"),
    "key": ({W: {"lo": 0, "high": 1}}, r"unknown setting 'tune.space.distillation.ah.w.lo'"),
    "condition": (
        {SA_LR: {**RANGE, "when": {SA_MLP: [8]}}},
        r"which the space does not list before",
    ),
    "range as condition": (
        {SA_W: RANGE, SA_LR: {**RANGE, "when": {SA_W: 1}}},
        r"when names 'distillation.sa.w', which is a range",
    ),
    "condition's value": (
        {SA_MLP: {"choice": [[4]]}, SA_LR: {**RANGE, "when": {SA_MLP: [8]}}},
        r"when requires distillation.sa.mlp = \[8\], which is not one of its choices",
    ),
}
MISTAKES: dict[str, tuple[dict[str, object], str]] = {
    name: ({"space": space}, message) for name, (space, message) in SPACES.items()
} | {
    "student": (
        {"students": ["tab22"]},
        r"tune.students names 'tab22', which is not in vm.models. Did you mean 'tab2'\?",
    ),
    "arm": ({"arms": ["labels", "ahh"]}, r"setting 'tune.arms.1'"),
    "no labels": ({"arms": ["ah"]}, r"tune.arms does not contain labels"),
    "overlap": (
        {"holdout_windows": [2, 4]},
        r"tune.holdout_windows begin at 2, but tune.validation_windows end at 2: holdout windows "
        r"must be later",
    ),
    "backwards": ({"validation_windows": [2, 1]}, r"tune.validation_windows is \[2, 1\]"),
    "calibration": (
        {"calibration": [1.05, 1.1]},
        r"tune.calibration is \[1.05, 1.1\]: set one bound below 1",
    ),
    "trials_per_process": ({"trials_per_process": 0}, r"setting 'tune.trials_per_process'"),
    "alike": (
        {
            "trials_per_process": 2,
            "arms": ["labels", "ah"],
            "space": {"distillation.ah.mlp": {"choice": [[], [8]]}},
        },
        r"tune.trials_per_process is 2, but every setting searched for arm ah "
        r"\(distillation.ah.mlp\) must be equal within a process",
    ),
    "condition in a block": (
        {
            "trials_per_process": 2,
            "space": {
                W: {"choice": [1, 2]},
                "distillation.ah.mlp": {"choice": [[], [8]], "when": {W: 1}},
            },
        },
        r"'distillation.ah.mlp': when names 'distillation.ah.w', which may differ between trials "
        r"of one process",
    ),
    "small population": (
        {"search": "pbt", "trials_per_process": 3, "early_stopping": "none", "trials": 3},
        r"tune.trials_per_process is 3: .*set it to at least 4",
    ),
    "part of a population": (
        {**PBT, "trials": 6},
        r"tune.trials is 6: .*set a multiple of tune.trials_per_process = 4",
    ),
    "population and halving": (
        {**PBT, "early_stopping": "asha"},
        r"tune.early_stopping is asha: .*set it to none",
    ),
    "population with seeds": ({**PBT, "seeds": 2}, r"tune.seeds is 2: .*set it to 1"),
    "population over one window": (
        {**PBT, "validation_windows": [2, 2]},
        r"tune.validation_windows holds one window",
    ),
    "unknown key": ({"trails": 3}, r"unknown setting 'tune.trails'. Did you mean 'trials'\?"),
}


def written(folder: Path, tune: object) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(
        yaml.safe_dump(
            {"vm": {"models": [{"name": "tab2", "domain": "2", "task": "click"}]}, "tune": tune},
            sort_keys=False,
        )
    )
    return path


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path: Path, name: str) -> None:
    """Wrong: a sweep starts with a space that fails in every trial, or chooses on the windows that
    judge it."""
    change, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        load_config(written(tmp_path, {**GOOD, **change}))


def test_round_trip(tmp_path: Path) -> None:
    """Wrong: a run's folder holds another sweep than the requested one, or its own config is
    refused."""
    space = {
        "distillation.ah.mlp": {"choice": [[], [8, 4]]},
        "distillation.ah.w": {"low": 0.1, "high": 3, "when": {"distillation.ah.mlp": [8, 4]}},
    }
    config = load_config(written(tmp_path, {**GOOD, "space": space}))
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config
    assert config.tune is not None and config.tune.space["distillation.ah.mlp"].choice == (
        (),
        (8, 4),
    )


def test_populations_and_groups(tmp_path: Path) -> None:
    """Wrong: a sweep in groups that could run is refused."""
    assert load_config(written(tmp_path, {**GOOD, **PBT})).tune is not None
    space = {
        "distillation.ah.mlp": {"choice": [[], [8]]},
        W: {**RANGE, "when": {"distillation.ah.mlp": [8]}},
    }
    assert (
        load_config(
            written(tmp_path, {**GOOD, "trials_per_process": 3, "seeds": 2, "space": space})
        ).tune
        is not None
    )


def test_with_settings() -> None:
    """Wrong: trials learn with other settings, or with ones that no config may have."""
    config = Config()
    changed = with_settings(config, {"distillation.sa.mlp": (), "vm.optimizer.dense_lr": 0.5})
    assert (changed.distillation.sa.mlp, changed.vm.optimizer.dense_lr) == ((), 0.5)
    assert (
        with_settings(changed, {"distillation.sa.mlp": (16,), "vm.optimizer.dense_lr": 0.001})
        == config
    )
    with pytest.raises(ValueError, match="greater than 0"):
        with_settings(config, {"distillation.ah.alpha": 0})
    assert json.dumps(config.model_dump(mode="json"))  # the original is untouched and whole


def test_settings_of_shared_rows_are_searched_for_arms_with_share() -> None:
    """Wrong: a sweep omits the settings of +share, or searches them for arms without it."""
    rate = "vm.optimizer.table_lr"
    mode = "distillation.share.mode"
    shared_rate = "distillation.share.table_lr"
    space = {
        mode: {"choice": ["replace", "average"]},
        W: RANGE,
        rate: {"low": 0.1, "high": 0.2},
        shared_rate: {"low": 0.01, "high": 0.02},
    }
    tune = Config.model_validate(
        {"tune": {**GOOD, "arms": ["labels", "ah", "labels+share", "ah+share"], "space": space}}
    ).tune
    assert tune is not None
    searched = {
        "labels": {rate},
        "ah": {W, rate},
        "labels+share": {mode, shared_rate},
        "ah+share": {mode, W, shared_rate},
    }
    assert {str(arm): set(tune.space_of(arm)) for arm in tune.arms} == searched


def test_tables_that_the_das_does_not_publish_are_not_searched() -> None:
    """Wrong: a trial shares fewer tables than its settings list."""
    tables = {"choice": [["user"], ["user", "ad"]]}
    tune = {**GOOD, "arms": ["labels", "kd+share"], "space": {"distillation.share.tables": tables}}
    assert (
        Config.model_validate(
            {"tune": tune, "distillation": {"share": {"tables": ["ad", "user"]}}}
        ).tune
        is not None
    )
    whole = Config.model_validate({"tune": tune}).tune
    assert whole is not None and whole.space["distillation.share.tables"].choice == (
        ("user",),
        ("user", "ad"),
    )
    for searched in (["user", "ad"], []):
        tune["space"] = {"distillation.share.tables": {"choice": [searched]}}
        with pytest.raises(
            ValueError,
            match=r"has the choice \[.*before the sweep begins the DAS publishes only rows of "
            r"\[\"user\"\]",
        ):
            Config.model_validate({"tune": tune, "distillation": {"share": {"tables": ["user"]}}})


def test_the_default_space_searches_shared_rows_for_arms_with_share() -> None:
    """Wrong: a sweep over arms with +share does not search their settings, or searches weights
    although nothing is averaged."""
    tune = Config.model_validate(
        {"tune": {**GOOD, "arms": ["labels", "kd", "kd+share", "ah+share+history"]}}
    ).tune
    assert tune is not None
    share = {
        f"distillation.share.{key}"
        for key in ("mode", "weight", "min_uses", "optimizer", "table_lr")
    }
    spaces = {str(arm): tune.space_of(arm) for arm in tune.arms}
    assert share & set(spaces["labels"]) == share & set(spaces["kd"]) == set()
    assert share <= set(spaces["kd+share"]) and share <= set(spaces["ah+share+history"])
    assert spaces["kd+share"]["distillation.share.weight"].when == {
        "distillation.share.mode": "average"
    }
