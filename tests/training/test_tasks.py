"""A vertical model of several tasks beside one of a single task: whole runs, supervision,
exports."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from local_runs import predictions, run_locally
from small_runs import WINDOWS, figures, metrics, small_config
from workers import Workers

from exfm_ray.config.arms import Objective
from exfm_ray.config.root import Config
from exfm_ray.data.batch import to_batch
from exfm_ray.data.stream import EventStream, list_values
from exfm_ray.models.serialization import load_model
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.stores.supervision import TEACHER_COLUMN

TASKS = ("conversion", "click")  # not in the stream's order
MODELS = [
    {"name": "one", "domain": "feed", "task": "click"},
    {"name": "both", "domain": "feed", "task": list(TASKS)},
]


@pytest.fixture(scope="module")
def config(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of both models."""
    config = small_config(tmp_path_factory.mktemp("tasks"), "tasks", vm={"models": MODELS})
    run_locally(groups, config)
    return config


def test_every_arm_has_figures_for_both_tasks(config: Config) -> None:
    """Wrong: a task is not evaluated or not in the summary, or only one task has supervision."""
    rows = [row for row in metrics(config).values() if row["model"] == "both"]
    found = {(row["window"], row["arm"], row["domain"], row["task"]) for row in rows}
    assert found == {
        (window, arm, "feed", task)
        for window in range(WINDOWS)
        for arm in Objective
        for task in TASKS
    }
    for task in TASKS:
        for window, different in (
            (1, 1),
            (2, len(Objective)),
        ):  # window 0 has no supervision, so all arms learn the same from it
            assert (
                len(
                    {
                        row["log_loss"]
                        for row in rows
                        if (row["window"], row["task"]) == (window, task)
                    }
                )
                == different
            )
    summary = {(row["arm"], row["task"]): row for row in figures(config) if row["model"] == "both"}
    assert summary.keys() == {(arm, task) for arm in Objective for task in TASKS}
    fm = {
        row["task"]: row["ne"]
        for row in figures(config)
        if row["model"] == "fm" and row["domain"] == "feed"
    }
    for (arm, task), row in summary.items():
        labels = summary[Objective.LABELS, task]["ne"]
        assert row["ne_gain"] == pytest.approx((labels - row["ne"]) / labels), (arm, task)
        assert row["fm_ne_gain"] == pytest.approx((labels - fm[task]) / labels), (arm, task)


@pytest.mark.parametrize("model", [MODELS[0] | {"task": ["click"]}, MODELS[1]], ids=["one", "both"])
def test_each_model_learns_as_if_alone(
    config: Config,
    groups: dict[int, Workers],
    model: dict[str, Any],
) -> None:
    """Wrong: another model's tasks shift the predictions that supervise this one, or a list of one
    task differs from the task."""
    alone = small_config(config.run.dir, f"{model['name']}-alone", vm={"models": [model]})
    run_locally(groups, alone)
    for key, row in metrics(alone).items():
        assert metrics(config)[key] == row


def supervised_labels(config: Config) -> list[tuple[np.ndarray, np.ndarray]]:
    """(labels, predictions) of each trainer's tasks; the teacher predicts 0.1 + 0.8 * label."""
    from exfm_ray.training.worker import build_groups

    (job,) = vm_jobs(config)
    stream = EventStream.open(job.stream_root)
    rows = stream.read(1, stream.window(1).fragments[0])
    labels = list_values(rows["labels"], 2)[
        :, [stream.schema.task_index(task) for task in job.tasks()]
    ]
    p = pa.array((0.1 + 0.8 * labels).astype(np.float32).ravel())
    rows = rows.append_column(TEACHER_COLUMN, pa.FixedSizeListArray.from_arrays(p, 2))
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def learn(trainer: Any, batch: Any) -> None:
        labels_BT = batch.features.labels_BT[:, list(trainer.tasks)]
        seen.append((labels_BT.numpy(), batch.teacher_BT.numpy()))

    for group in build_groups(job, stream.schema, torch.device("cpu")):
        for trainer in group.trainers:
            trainer.learn = partial(learn, trainer)  # type: ignore[method-assign]
        group.learn(rows)
    return seen


def test_supervision_is_of_the_students_tasks(config: Config, groups: dict[int, Workers]) -> None:
    """Wrong: a task is supervised by another task's predictions."""
    seen = groups[1].run(supervised_labels, config)[0]
    assert [labels.shape[1] for labels, _ in seen] == [1] * len(Objective) + [2] * len(Objective)
    for labels, teacher in seen:
        np.testing.assert_allclose(teacher, 0.1 + 0.8 * labels, rtol=1e-6)
    labels = seen[-1][0]
    assert labels[:, 0].any() and (labels[:, 0] < labels[:, 1]).any(), (
        "equal tasks would hide an error"
    )


def test_exports_all_tasks_in_their_order(config: Config, groups: dict[int, Workers]) -> None:
    """Wrong: an exported model has fewer tasks than were learned, or names them in another
    order."""
    stream = EventStream.open(config.folder / "stream")
    batch = to_batch(stream.read(0, stream.window(0).fragments[0]).slice(0, 100), stream.schema)
    trained = groups[1].run(predictions, config, 100)[0]
    for arm in Objective:
        model, manifest = load_model(config.folder / "exported" / f"both-{arm}")
        assert manifest.tasks == TASKS
        # the same float32 weights; fbgemm and torch add the rows of a bag in their own ways
        torch.testing.assert_close(
            model.score(batch),
            torch.sigmoid(torch.from_numpy(trained[f"both-{arm}"])),
            rtol=1e-5,
            atol=1e-6,
        )
