"""Arms with +history on whole runs: their inputs, rules 1 and 2, any number of workers, resuming,
user errors."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from local_runs import run_locally, score, train
from safetensors.numpy import load_file
from small_runs import WINDOWS, assert_close, figures, flip_labels, metrics, rewrite, small_config
from whole_student import WORKERS_TOLERANCE, Whole
from workers import Workers

from exfm_ray.config.checks import with_settings
from exfm_ray.config.root import Config
from exfm_ray.data.batch import to_batch
from exfm_ray.data.stream import EventStream, window_name
from exfm_ray.errors import UserError
from exfm_ray.models.serialization import load_model
from exfm_ray.models.user_features import HISTORY
from exfm_ray.pipeline.preflight import check_models, prepare_stream
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.schema import Schema
from exfm_ray.serving.delta import main as delta_main
from exfm_ray.serving.export import export_student
from exfm_ray.storage.atomic import read_json, write_json
from exfm_ray.stores.user_history import history_store
from exfm_ray.training.job import Job
from exfm_ray.training.worker import Worker

ARMS = ["labels", "labels+history", "kd+share+history"]
VARIANTS: dict[str, dict[str, Any]] = {
    "pinned": {},
    "aligned": {"embedding_space": "aligned", "last_k": 3},
}


def config_of(
    folder: Path,
    name: str,
    history: dict[str, Any] | None = None,
    **changes: Any,
) -> Config:
    vm = {"arms": ARMS} | changes.pop("vm", {})
    return small_config(
        folder, name, vm=vm, distillation={"history": {"dim": 4} | (history or {})}, **changes
    )


@pytest.fixture(scope="module")
def whole(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Undisturbed runs on one worker, each run once."""
    folder = tmp_path_factory.mktemp("remembering")

    @cache
    def run(variant: str) -> Config:
        config = config_of(folder, variant, VARIANTS[variant])
        run_locally(groups, config)
        return config

    return run


@pytest.fixture
def base(whole: Whole) -> Config:
    return whole("pinned")


def test_history_reaches_its_arms_only(
    base: Config,
    groups: dict[int, Workers],
    tmp_path: Path,
) -> None:
    """Wrong: a plain arm reads the history, an arm with +history does not, or the stored model is
    not the one that learned."""
    plain = small_config(tmp_path, "plain", vm={"arms": ["labels"]})
    run_locally(groups, plain)
    for key, row in metrics(plain).items():
        if row["role"] == "vm":
            assert metrics(base)[key] == row
    last = {
        row["arm"]: row["ne"]
        for row in metrics(base).values()
        if row["model"] == "feed" and row["window"] == WINDOWS - 1
    }
    assert len(set(last.values())) == len(ARMS)
    dense = {
        arm: len(load_model(base.folder / "exported" / f"feed-{arm}")[1].example.dense)
        for arm in ARMS
    }
    assert dense["labels+history"] == dense["kd+share+history"] == dense["labels"] + 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_workers_equal_one(
    whole: Whole,
    groups: dict[int, Workers],
    tmp_path: Path,
    variant: str,
) -> None:
    """Wrong: a worker reads the history of another worker's rows."""
    one = whole(variant)
    config = with_settings(one, {"run.dir": str(tmp_path), "vm.workers": 2, "fm.workers": 2})
    run_locally(groups, config)
    assert_close(
        list(metrics(config).values()),
        [metrics(one)[key] for key in metrics(config)],
        WORKERS_TOLERANCE,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumes_after_a_kill(
    whole: Whole,
    groups: dict[int, Workers],
    tmp_path: Path,
    variant: str,
) -> None:
    """Wrong: a run killed between a window's figures and its checkpoint, or between two batches,
    has other results than an undisturbed one."""
    undisturbed = whole(variant)
    windows = list(range(WINDOWS))
    killed = with_settings(
        undisturbed, {"run.dir": str(tmp_path), "checkpoint.every_examples": 150}
    )
    prepare_stream(killed)
    groups[1].run(train, Job("fm", killed), windows, None)
    groups[1].run(score, killed)
    (job,) = vm_jobs(killed)
    for dies_at, batches in ((2, 5), (2, None)):
        groups[1].run(train, job, windows, dies_at, batches)
    assert job.checkpoints.latest().windows == 2 and job.checkpoints.latest().examples >= 150, (
        "inside the window"
    )
    run_locally(groups, killed)
    assert metrics(killed) == metrics(undisturbed)
    assert figures(killed) == figures(undisturbed)


@pytest.mark.parametrize(("drift", "lag"), [("pinned", 1), ("aligned", 1), ("refreshed", 2)])
def test_histories_do_not_depend_on_later_labels(
    groups: dict[int, Workers],
    tmp_path: Path,
    drift: str,
    lag: int,
) -> None:
    """Wrong: the history that a vertical model reads in a window depends on labels of that window
    or later ones (rule 2)."""
    changed_at = 2
    runs = [
        config_of(tmp_path, name, {"embedding_space": drift}, das={"fm_lag": lag})
        for name in ("as_is", "changed")
    ]
    stream = prepare_stream(runs[1])
    for window in range(changed_at, WINDOWS):
        rewrite(stream, window, flip_labels)
    for config in runs:
        run_locally(groups, config)
    for window in range(lag, WINDOWS):  # a window's folder is read from the next window on
        files = [
            sorted((c.folder / "history" / "fm" / window_name(window)).iterdir()) for c in runs
        ]
        assert [path.name for path in files[0]] == [path.name for path in files[1]] and len(
            files[0]
        ) == 6
        equal = all(
            one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True)
        )
        assert equal == (window < changed_at + lag or drift == "pinned"), window
    both_metrics = [
        {k: r for k, r in metrics(c).items() if r["window"] <= changed_at and r["model"] == "feed"}
        for c in runs
    ]
    for key in both_metrics[0]:  # mean prediction, in which the labels cancel out
        means = [rows[key]["calibration"] * rows[key]["label_rate"] for rows in both_metrics]
        np.testing.assert_allclose(means[1], means[0], rtol=1e-12, err_msg=str(key))


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (
            {"layer": "backbon"},
            "'distillation.history.layer': the FM's network has no module 'backbon'. "
            "Did you mean 'backbone'",
        ),
        (
            {"key": "usr"},
            "'distillation.history.key' is usr: name a single-valued feature: user, "
            ".*Did you mean 'user'",
        ),
    ],
)
def test_missing_parts_of_a_snapshot_are_reported_at_once(
    base: Config,
    tmp_path: Path,
    history: dict[str, Any],
    message: str,
) -> None:
    """Wrong: the error is reported after hours, or never."""
    with pytest.raises(UserError, match=message):
        check_models(
            config_of(tmp_path, "wrong", history), EventStream.open(base.folder / "stream").schema
        )


def test_a_module_without_output_is_reported_at_once(base: Config, tmp_path: Path) -> None:
    """Wrong: a module of the FM that is never called, or has no output for each example, is
    reported in the first window only."""
    fm = {"type": "masknet", "dim": 4, "blocks": 2, "block_width": 4, "mask_mlp": [4], "mlp": [4]}
    schema = EventStream.open(base.folder / "stream").schema
    with pytest.raises(
        UserError,
        match=r"'distillation.history.layer' is backbone.blocks: this module .* "
        "puts out no numbers for each example",
    ):
        check_models(
            with_settings(
                config_of(tmp_path, "wrong", {"layer": "backbone.blocks"}), {"fm.model": fm}
            ),
            schema,
        )
    check_models(
        with_settings(
            config_of(tmp_path, "right", {"layer": "backbone.blocks.1"}), {"fm.model": fm}
        ),
        schema,
    )


def evaluated(config: Config, folder: Path) -> dict[str, Any]:
    """Probabilities of the trained models of `feed` on its rows of the last window.

    The models are those of the last checkpoint; the history is that at the end of the stream.
    The rows are written to `folder`.
    """
    (job,) = vm_jobs(config)
    worker = Worker(job, None, None, torch.device("cpu"))
    job.checkpoints.load(job.checkpoints.latest(), worker.loop)
    history = history_store(config)
    group = worker.loop.groups[0]
    stream = EventStream.open(config.folder / "stream")
    assert history
    events = stream.read(WINDOWS - 1, stream.window(WINDOWS - 1).fragments[0])
    rows = group.select(history.join(WINDOWS, events, stream.schema))
    pq.write_table(rows, folder / "rows.parquet")
    return {
        name: 1 / (1 + np.exp(-logits.astype(np.float64)))
        for name, logits in group.evaluate(rows).logits.items()
    }


def served_inputs(
    served: Path,
    rows: pa.Table,
    schema: Schema,
) -> dict[str, np.ndarray[Any, Any]]:
    """The inputs of a server: the examples' columns and their users' features from served files."""
    schema_json = read_json(served / "schema.json")
    history = schema_json["history"]
    store = load_file(served / history["file"])
    features_of = dict(zip(store["users"].tolist(), store["inputs"], strict=True))
    batch = to_batch(rows, schema)
    inputs = {
        name: getattr(batch, name).numpy()
        for name in ("sparse_BS", "dense_BD", "bag_values_V", "bag_lengths_MB")
    }
    names = [feature["name"] for feature in schema_json["sparse_BS"]]
    users = inputs["sparse_BS"][:, names.index(history["key"])]
    unknown = np.zeros(history["inputs"], np.float32)
    user_features = np.stack([features_of.get(int(user), unknown) for user in users])
    assert user_features.any()
    return inputs | {"dense_BD": np.concatenate([inputs["dense_BD"], user_features], axis=1)}


def test_served_with_its_feature_store_it_predicts_as_trained(
    base: Config,
    groups: dict[int, Workers],
    tmp_path: Path,
) -> None:
    """Wrong: a server with the served feature store predicts other values than the trained model
    with the same history."""
    (expected,) = groups[1].run(evaluated, base, tmp_path)
    stream = EventStream.open(base.folder / "stream")
    rows = pq.read_table(tmp_path / "rows.parquet")
    served = export_student(base.folder, "feed", "labels+history", tmp_path / "served")
    session = onnxruntime.InferenceSession(served / "model.onnx")
    (predicted,) = session.run(None, served_inputs(served, rows, stream.schema))
    np.testing.assert_allclose(predicted, expected["feed-labels+history"], rtol=0, atol=1e-5)
    other = expected["feed-kd+share+history"]
    assert np.abs(predicted - other).max() > 1e-3, "any student would pass"


def test_a_delta_has_the_changed_users(groups: dict[int, Workers], tmp_path: Path) -> None:
    """Wrong: a server that applies deltas has another store than one with full exports, or is sent
    all of it."""
    model = {"name": "feed", "domain": "feed", "task": "click"}
    config = config_of(tmp_path, "run", vm={"arms": ["labels+history"], "models": [model]})
    windows = prepare_stream(config).windows()
    groups[1].run(train, Job("fm", config), windows, None)
    groups[1].run(score, config)
    (job,) = vm_jobs(config)
    groups[1].run(train, job, windows[:2], None)
    earlier = export_student(config.folder, "feed", "labels+history", tmp_path / "earlier")
    groups[1].run(train, job, windows, None)
    full = export_student(config.folder, "feed", "labels+history", tmp_path / "full")
    delta = export_student(
        config.folder, "feed", "labels+history", tmp_path / "delta", since=earlier
    )
    assert (
        0
        < read_json(delta / "manifest.json")["changed_users"]
        <= len(load_file(full / HISTORY)["users"])
    )
    assert delta_main([str(earlier), str(delta), str(tmp_path / "now")]) == 0
    for file in ("tables.safetensors", HISTORY, "schema.json"):
        assert (tmp_path / "now" / file).read_bytes() == (full / file).read_bytes() != b""
    assert (earlier / HISTORY).read_bytes() != (full / HISTORY).read_bytes()
    assert delta_main([str(full), str(delta), str(tmp_path / "wrong")]) == 2


def test_a_model_without_its_feature_store_is_refused(base: Config, tmp_path: Path) -> None:
    """Wrong: a served folder misses inputs that its model needs."""
    folder = Path(
        shutil.copytree(
            base.folder / "exported" / "feed-labels+history",
            tmp_path / "exported" / "feed-labels+history",
        )
    )
    (tmp_path / "stream").symlink_to(base.folder / "stream")
    (folder / HISTORY).write_bytes((folder / HISTORY).read_bytes()[:-1] + b"\1")
    with pytest.raises(
        UserError, match="history.safetensors: missing or not the file that model.json describes"
    ):
        export_student(tmp_path, "feed", "labels+history")
    stored = read_json(folder / "model.json")
    facts = {key: value for key, value in stored["facts"].items() if key != "history"}
    files = {name: digest for name, digest in stored["files"].items() if name != HISTORY}
    write_json(folder / "model.json", stored | {"facts": facts, "files": files})
    with pytest.raises(
        UserError, match=r"arm 'labels\+history' was stored without its feature store"
    ):
        export_student(tmp_path, "feed", "labels+history")
