"""Arms with +share and +history with every interaction model: they read the teacher's data and are
served with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from local_runs import score, train
from small_runs import metrics, small_config
from workers import Workers

from exfm_ray.config.models import MODEL_TYPES
from exfm_ray.config.root import Config
from exfm_ray.data.batch import to_batch
from exfm_ray.data.stream import EventStream
from exfm_ray.models.serialization import load_model
from exfm_ray.models.user_features import UserFeatures
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.serving.export import export_student, with_user_features
from exfm_ray.training.job import Job

SIZES: dict[str, dict[str, Any]] = {
    "wukong": {"l": 1, "n_F": 2, "n_L": 2, "k": 2, "fmb_mlp": [8], "mlp": [8]},
    "mlp": {"mlp": [8]},
    "dlrm": {"bottom_mlp": [8], "top_mlp": [8]},
    "dcnv2": {"cross_layers": 1, "mlp": [8]},
    "deepfm": {"mlp": [8]},
    "masknet": {"blocks": 2, "block_width": 8, "mask_mlp": [8], "mlp": [8]},
    "finalmlp": {"mlp_1": [8], "mlp_2": [8]},
    "din": {"sequence_length": 3, "attention_mlp": [4], "mlp": [8]},
}
ARMS = ["kd", "kd+history", "ah+share", "ah_sa+share+history"]
WINDOWS = 3


@pytest.fixture(scope="module")
def trained(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A student of each model over three windows."""
    students = [
        {"name": kind, "domain": "feed", "task": "click", "model": {"type": kind, "dim": 4, **size}}
        for kind, size in SIZES.items()
    ]
    data = {"synthetic": {"windows": WINDOWS, "events_per_window": 500}}
    vm = {"models": students, "arms": ARMS}
    config = small_config(
        tmp_path_factory.mktemp("students"),
        "all",
        data=data,
        vm=vm,
        distillation={"history": {"dim": 4}},
    )
    windows = prepare_stream(config).windows()
    groups[1].run(train, Job("fm", config), windows, None)
    groups[1].run(score, config)
    groups[1].run(train, vm_jobs(config)[0], windows, None)
    return config


def test_every_model_is_there() -> None:
    """Wrong: a new model is not tested with these arms."""
    assert set(SIZES) == set(MODEL_TYPES)


@pytest.mark.parametrize("kind", SIZES)
def test_rows_and_histories_reach_every_model(trained: Config, kind: str) -> None:
    """Wrong: a model is served without the teacher's rows, does not read its history, or does not
    learn with either."""
    teacher = load_model(trained.folder / "snapshots" / "fm" / f"version={WINDOWS:03d}")[
        0
    ].tables.tables()
    stream = EventStream.open(trained.folder / "stream")
    plain = to_batch(stream.read(2, stream.window(2).fragments[0]), stream.schema)
    for arm in ARMS:
        folder = trained.folder / "exported" / f"{kind}-{arm}"
        model, stored = load_model(folder)
        equal = [torch.equal(table, teacher[name]) for name, table in model.tables.tables().items()]
        assert all(equal) if "share" in arm else not any(equal)
        assert (
            stored.remembered == (5 if "history" in arm else 0)
            and stored.stream.digest == stream.schema.digest
        )
        if "history" in arm:
            past = UserFeatures.read(folder)
            nobody = UserFeatures(past.users_U[:0], past.inputs_UF[:0])
            with_it, without = (
                model.score(with_user_features(plain, stored, known)) for known in (past, nobody)
            )
            assert (with_it - without).abs().max() > 1e-4, arm
    ne = {
        (row["arm"], row["window"]): row["ne"]
        for row in metrics(trained).values()
        if row["model"] == kind
    }
    assert (
        set(ne) == {(arm, window) for arm in ARMS for window in range(WINDOWS)}
        and np.isfinite(list(ne.values())).all()
    )
    assert len({ne[arm, 2] for arm in ARMS}) == len(ARMS)


def test_a_model_that_reads_sequences_is_served_with_its_history(
    trained: Config, tmp_path: Path
) -> None:
    """Wrong: a served model with sequences, shared rows and a history predicts other values than
    the trained one."""
    served = export_student(trained.folder, "din", "ah_sa+share+history", tmp_path / "served")
    model, stored = load_model(trained.folder / "exported" / "din-ah_sa+share+history")
    stream = EventStream.open(trained.folder / "stream")
    batch = with_user_features(
        to_batch(stream.read(1, stream.window(1).fragments[0]), stream.schema),
        stored,
        UserFeatures.read(served),
    )
    inputs = {
        name: getattr(batch, name).numpy()
        for name in ("sparse_BS", "dense_BD", "bag_values_V", "bag_lengths_MB")
    }
    (found,) = onnxruntime.InferenceSession(served / "model.onnx").run(None, inputs)
    np.testing.assert_allclose(found, model.score(batch).numpy(), rtol=0, atol=1e-5)
