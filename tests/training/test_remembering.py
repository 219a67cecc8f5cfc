"""Arms with +history on whole runs: what reaches them, rules 1 and 2, any number of workers, resumption, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_runs import run_locally, score, train
from small_runs import WINDOWS, assert_close, figures, flip_labels, metrics, rewrite, small_config
from test_sharing import WORKERS_TOLERANCE
from workers import Workers

from exfm_ray.config import Config
from exfm_ray.data.stream import EventStream, window_name
from exfm_ray.errors import UserError
from exfm_ray.models.stored import load_model
from exfm_ray.pipeline import check_models, prepare_stream, vm_jobs
from exfm_ray.serving.export import export_student
from exfm_ray.training.job import Job

ARMS = ["labels", "labels+history", "kd+share+history"]


def config_of(folder: Path, name: str, history: dict[str, Any] | None = None, **changes: Any) -> Config:
    vm = {"arms": ARMS} | changes.pop("vm", {})
    return small_config(folder, name, vm=vm, distillation={"history": {"dim": 4} | (history or {})}, **changes)


@pytest.fixture(scope="module")
def base(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = config_of(tmp_path_factory.mktemp("remembering"), "base")
    run_locally(groups, config)
    return config


def test_history_reaches_its_arms_only(base: Config, groups: dict[int, Workers], tmp_path: Path) -> None:
    """Wrong: a plain arm reads the history, or one with +history does not; the model that is stored is not the one that learnt."""
    plain = small_config(tmp_path, "plain", vm={"arms": ["labels"]})
    run_locally(groups, plain)
    for key, row in metrics(plain).items():
        if row["role"] == "vm":
            assert metrics(base)[key] == row
    last = {row["arm"]: row["ne"] for row in metrics(base).values() if row["model"] == "feed" and row["window"] == WINDOWS - 1}
    assert len(set(last.values())) == len(ARMS)
    dense = {arm: len(load_model(base.folder / "exported" / f"feed-{arm}")[1].example.dense) for arm in ARMS}
    assert dense["labels+history"] == dense["kd+share+history"] == dense["labels"] + 5


def test_two_workers_equal_one(base: Config, groups: dict[int, Workers], tmp_path: Path) -> None:
    """Wrong: a worker reads other rows' history."""
    config = config_of(tmp_path, "two", vm={"workers": 2}, fm={"workers": 2})
    run_locally(groups, config)
    assert_close(list(metrics(config).values()), [metrics(base)[key] for key in metrics(config)], WORKERS_TOLERANCE)


@pytest.mark.parametrize("drift", ["pinned", "aligned"])
def test_goes_on_after_a_kill(groups: dict[int, Workers], tmp_path: Path, drift: str) -> None:
    """Wrong: a run killed between a window's figures and its checkpoint ends otherwise than an undisturbed one."""
    whole, killed = (config_of(tmp_path, name, {"drift": drift, "last": 2}) for name in ("whole", "killed"))
    run_locally(groups, whole)
    prepare_stream(killed)
    groups[1].run(train, Job("fm", killed), list(range(WINDOWS)), None)
    groups[1].run(score, killed)
    groups[1].run(train, vm_jobs(killed)[0], list(range(WINDOWS)), 2)
    run_locally(groups, killed)
    assert metrics(killed) == metrics(whole)
    assert figures(killed) == figures(whole)


@pytest.mark.parametrize("drift", ["pinned", "aligned"])
def test_later_labels_change_nothing_that_is_given(groups: dict[int, Workers], tmp_path: Path, drift: str) -> None:
    """Wrong: what a vertical model reads of the past in a window depends on labels of that window or later ones (rule 2)."""
    changed_at = 2
    runs = [config_of(tmp_path, name, {"drift": drift}) for name in ("as_is", "changed")]
    stream = prepare_stream(runs[1])
    for window in range(changed_at, WINDOWS):
        rewrite(stream, window, flip_labels)
    for config in runs:
        run_locally(groups, config)
    for window in range(1, WINDOWS):  # what lies in a window's folder is given from the next one on
        files = [sorted((c.folder / "history" / "fm" / window_name(window)).iterdir()) for c in runs]
        assert [path.name for path in files[0]] == [path.name for path in files[1]] and len(files[0]) == 6
        equal = all(one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True))
        assert equal == (window <= changed_at or drift == "pinned"), window
    told = [{k: r for k, r in metrics(c).items() if r["window"] <= changed_at and r["model"] == "feed"} for c in runs]
    for key in told[0]:  # mean prediction, in which the labels cancel out
        means = [one[key]["calibration"] * one[key]["label_rate"] for one in told]
        np.testing.assert_allclose(means[1], means[0], rtol=1e-12, err_msg=str(key))


@pytest.mark.parametrize(("history", "told"), [
    ({"layer": "backbon"}, "'distillation.history.layer': the FM's network has no module 'backbon'. Did you mean 'backbone'"),
    ({"key": "usr"}, "'distillation.history.key' is usr: name a single-valued feature: user, .*Did you mean 'user'"),
])  # fmt: skip
def test_what_a_snapshot_does_not_give_is_told_at_once(base: Config, tmp_path: Path, history: dict[str, Any], told: str) -> None:
    """Wrong: the mistake is found after hours, or never."""
    with pytest.raises(UserError, match=told):
        check_models(config_of(tmp_path, "wrong", history), EventStream.open(base.folder / "stream").schema)


def test_export_without_its_feature_store_is_refused(base: Config) -> None:
    """Wrong: a served folder promises predictions for which it lacks inputs."""
    with pytest.raises(UserError, match=r"arm 'labels\+history' reads a feature store at serving"):
        export_student(base.folder, "feed", "labels+history")
