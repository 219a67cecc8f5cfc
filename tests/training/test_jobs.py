"""Training jobs: equal figures for any number of workers, grouping of models and interruption; what
they export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from local_runs import predictions, run_locally, score, train
from safetensors.torch import load_file
from small_runs import WINDOWS, assert_close, figures, metrics, small_config
from workers import Workers

from exfm_ray.config.arms import ALL_OBJECTIVES
from exfm_ray.config.root import Config
from exfm_ray.data.batch import to_batch
from exfm_ray.data.sources.synthetic_world import DOMAINS
from exfm_ray.data.stream import EventStream
from exfm_ray.models.serialization import load_model
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.storage.atomic import read_json, write_json
from exfm_ray.training.checkpoint import BEGINNING, Checkpoints, Cursor
from exfm_ray.training.job import Job

KEYS = {
    "window",
    "role",
    "model",
    "arm",
    "domain",
    "task",
    "seed",
    "ne",
    "auc",
    "gauc",
    "log_loss",
    "calibration",
    "label_rate",
    "examples",
    "examples_per_s",
    "snapshot",
}
SUMMARY_KEYS = KEYS - {"window", "examples_per_s"} | {"best_ne"}
VM_SUMMARY_KEYS = SUMMARY_KEYS | {"ne_gain", "fm_ne_gain", "transfer_ratio"}
# 60 steps in float32; sums over two workers are rounded otherwise, and Adagrad and Adam carry the
# difference on
WORKERS_TOLERANCE = 1e-3


def test_metrics_have_the_promised_rows(base: Config) -> None:
    """Wrong: metrics.jsonl misses a row or a key, or has an undocumented one."""
    from exfm_ray.tracking.recorder import read_metrics

    rows = read_metrics(base.folder / "metrics.jsonl")
    assert all(set(row) == KEYS for row in rows)
    found = {(row["window"], row["model"], row["arm"], row["domain"], row["task"]) for row in rows}
    expected = set()
    for window in range(WINDOWS):
        for domain in ("all", *DOMAINS):
            expected |= {(window, "fm", "fm", domain, task) for task in ("click", "conversion")}
        for arm in ALL_OBJECTIVES:
            expected |= {
                (window, "feed", str(arm), "feed", "click"),
                (window, "stories", str(arm), "stories", "conversion"),
            }
    assert found == expected
    for row in rows:
        distilled = (
            row["arm"] in ("kd", "ah", "ah_sa") and row["window"] >= 2
        )  # window 1 is the first with supervision
        assert row["snapshot"] == (row["window"] - 1 if distilled else None)
        assert row["role"] == ("fm" if row["model"] == "fm" else "vm")


def test_every_arm_learns_in_its_own_way(base: Config) -> None:
    """Wrong: the supervision does not reach the arms, or all arms learn the same."""
    for window, different in (
        (1, 1),
        (2, len(ALL_OBJECTIVES)),
    ):  # window 0 has no supervision, so all arms learn the same from it
        rows = [
            row
            for row in metrics(base).values()
            if row["window"] == window and row["model"] == "feed"
        ]
        assert (
            len(rows) == len(ALL_OBJECTIVES) and len({row["log_loss"] for row in rows}) == different
        )


def test_summary_has_the_promised_keys(base: Config) -> None:
    """Wrong: summary.json misses a figure, counts warm-up windows, or compares with the wrong
    baseline."""
    summary = read_json(base.folder / "summary.json")
    assert set(summary) == {
        "name",
        "seed",
        "windows",
        "figures",
        "roles",
        "peak_memory_bytes",
        "failed_items",
        "fallback_windows",
    }
    assert summary["failed_items"] == summary["fallback_windows"] == []
    assert summary["windows"] == [1, 2, 3]
    assert set(summary["roles"]) == {"fm", "das", "vm"}
    assert summary["roles"]["fm"]["examples"] == WINDOWS * 900
    rows = figures(base)
    for row in rows:
        assert set(row) == (VM_SUMMARY_KEYS if row["role"] == "vm" else SUMMARY_KEYS)
        same = [
            m
            for m in metrics(base).values()
            if m["window"] >= 1 and all(m[k] == row[k] for k in ("model", "arm", "domain", "task"))
        ]
        assert row["examples"] == sum(m["examples"] for m in same)
    ne = {(row["model"], row["arm"], row["domain"], row["task"]): row["ne"] for row in rows}
    labels = ne["feed", "labels", "feed", "click"]
    fm = ne["fm", "fm", "feed", "click"]
    for row in rows:
        if row["model"] == "feed":
            assert row["ne_gain"] == pytest.approx((labels - row["ne"]) / labels)
            assert row["fm_ne_gain"] == pytest.approx((labels - fm) / labels)


@pytest.mark.parametrize(
    "changes",
    [
        {"fm": {"workers": 2, "zero_stage": 3}, "vm": {"workers": 2, "zero_stage": 2}},
        {
            "fm": {"sharding": "table_wise", "workers": 2},
            "vm": {"sharding": "table_wise", "workers": 2},
        },
    ],
    ids=["row_wise", "table_wise"],
)
def test_two_workers_equal_one(
    base: Config,
    groups: dict[int, Workers],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    """Wrong: the number of workers or the sharding changes a figure."""
    config = small_config(tmp_path, "two", **changes)
    run_locally(groups, config)
    assert metrics(config).keys() == metrics(base).keys()
    assert_close(
        list(metrics(config).values()),
        [metrics(base)[key] for key in metrics(config)],
        WORKERS_TOLERANCE,
    )


def test_neither_grouping_nor_order_of_models_matters(
    base: Config,
    groups: dict[int, Workers],
    tmp_path: Path,
) -> None:
    """Wrong: vertical models or arms that learn in one process influence each other."""
    reversed_ = [model.model_dump(mode="json") for model in reversed(base.vm.models)]
    for name, vm in {
        "apart": {"shared_pass": False},
        "arms": {"arms": ["ah_sa", "ah", "kd", "labels"], "models": reversed_},
    }.items():
        config = small_config(tmp_path, name, vm=vm)
        run_locally(groups, config)
        assert metrics(config) == metrics(base), name
        assert figures(config) == figures(base), name
    alone = small_config(tmp_path, "alone", vm={"arms": ["kd"], "models": reversed_[:1]})
    run_locally(groups, alone)
    for key, row in metrics(alone).items():
        assert metrics(base)[key] == row


@pytest.mark.parametrize("workers", [1, 2])
def test_resumes_after_a_kill(
    groups: dict[int, Workers],
    tmp_path: Path,
    workers: int,
) -> None:
    """Wrong: a run killed twice between a window's figures and its checkpoint has other results
    than an undisturbed one."""
    trainers = {"fm": {"workers": workers}, "vm": {"workers": workers}}
    whole, killed = (small_config(tmp_path, name, **trainers) for name in ("whole", "killed"))
    run_locally(groups, whole)
    prepare_stream(killed)
    windows = list(range(WINDOWS))
    groups[workers].run(train, Job("fm", killed), windows, 0)
    groups[workers].run(train, Job("fm", killed), windows, 2)
    groups[workers].run(train, Job("fm", killed), windows, None)
    groups[1].run(score, killed)
    for dies_at in (1, 3):
        for job in vm_jobs(killed):
            groups[workers].run(train, job, windows, dies_at)
    run_locally(groups, killed)
    assert metrics(killed) == metrics(whole)
    assert figures(killed) == figures(whole)


def test_resumes_from_the_previous_checkpoint(
    base: Config,
    groups: dict[int, Workers],
    tmp_path: Path,
) -> None:
    """Wrong: a checkpoint is not the whole state: resuming from an older one gives other figures or
    other models."""
    config = small_config(tmp_path, "base")
    shutil.copytree(base.folder, config.folder)
    (config.folder / "config.yaml").unlink(missing_ok=True)
    for job in [Job("fm", config), *vm_jobs(config)]:
        assert len(list(job.checkpoints.root.glob("windows=*"))) == config.checkpoint.keep
        shutil.rmtree(job.checkpoints.root / f"windows={WINDOWS:03d}")
    shutil.rmtree(config.folder / "exported")
    (config.folder / "metrics.jsonl").unlink()
    run_locally(groups, config)
    assert set(metrics(config)) == {key for key in metrics(base) if key[0] == WINDOWS - 1}
    assert figures(config) == figures(base)
    for file in sorted((base.folder / "exported").rglob("*.safetensors")):
        again = config.folder / file.relative_to(base.folder)
        assert again.read_bytes() == file.read_bytes(), again


def test_serving_pays_nothing(base: Config) -> None:
    """Wrong: an auxiliary head or the adapter is served, or the arm changes the served graph (rule
    6)."""
    schema = EventStream.open(base.folder / "stream").schema
    for vm in ("feed", "stories"):
        seen = set()
        for arm in ALL_OBJECTIVES:
            folder = base.folder / "exported" / f"{vm}-{arm}"
            files = {path.name: path.stat().st_size for path in folder.iterdir()}
            files["model.json"] -= len(arm)  # the arm's name in the facts is all that may differ
            shapes = {
                (f.name, name, tuple(t.shape))
                for f in folder.glob("*.safetensors")
                for name, t in load_file(f).items()
            }
            model, manifest = load_model(folder)
            assert manifest.facts == {"vm": vm, "arm": arm, "windows": WINDOWS, "seed": 0}
            stream = EventStream.open(base.folder / "stream")
            batch = to_batch(stream.read(0, stream.window(0).fragments[0]), schema)
            inputs = (batch.sparse_BS, batch.bag_values_V, batch.bag_lengths_MB, batch.dense_BD)
            graph = torch.export.export(model, inputs).graph_module.code
            seen.add((tuple(sorted(files.items())), frozenset(shapes), graph))
        assert len(seen) == 1


def test_exported_models_predict_what_the_trained_ones_predict(
    base: Config, groups: dict[int, Workers]
) -> None:
    """Wrong: the export is of another arm, of an older state, or loses a table's rows."""
    stream = EventStream.open(base.folder / "stream")
    batch = to_batch(stream.read(0, stream.window(0).fragments[0]).slice(0, 100), stream.schema)
    trained = groups[1].run(predictions, base, 100)[0]
    assert len(trained) == 2 * len(ALL_OBJECTIVES)
    for name, logits in trained.items():
        model, _ = load_model(base.folder / "exported" / name)
        # the same float32 weights; fbgemm and torch add the rows of a bag in their own ways
        torch.testing.assert_close(
            model.score(batch), torch.sigmoid(torch.from_numpy(logits)), rtol=1e-5, atol=1e-6
        )


def test_old_checkpoints_are_removed_and_the_newest_stays(
    groups: dict[int, Workers], tmp_path: Path
) -> None:
    """Wrong: from 1,000 windows on, folders are sorted as text, and the newest is removed."""
    assert groups[1].run(save_some, tmp_path, [998, 999, 1000, 1001]) == [
        ["windows=1000", "windows=1001"]
    ]


def save_some(root: Path, numbers: list[int]) -> list[str]:
    """Save checkpoints without models; return the folders that are left."""
    from exfm_ray.training.async_checkpoint import AsyncCheckpointer
    from exfm_ray.training.loop import Loop

    loop: Any = Loop("fm", 0, [], None, None, None, 1, 0)  # type: ignore[arg-type]
    saver = AsyncCheckpointer(Checkpoints(root), 2)
    for number in numbers:
        saver.save(Cursor(number), loop)
    saver.finish()
    return sorted(path.name for path in root.iterdir())


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    """Wrong: a job resumes from a checkpoint that a kill left half-written (rule 5)."""
    assert Checkpoints(tmp_path).latest() == BEGINNING
    (tmp_path / "windows=002").mkdir()
    (tmp_path / "windows=001").mkdir()
    facts = {
        "windows": 1,
        "examples": 0,
        "workers": 1,
        "files": {},
        "teacher": None,
        "timings": [],
        "underway": None,
        "stopping": None,
    }
    write_json(tmp_path / "windows=001" / "manifest.json", facts)
    assert Checkpoints(tmp_path).latest() == Cursor(1)


def test_workers_belong_on_their_roles_nodes(tmp_path: Path) -> None:
    """Wrong: vertical models run on the foundation model's nodes."""
    config = small_config(
        tmp_path,
        "placed",
        placement={"fm": {"group": "gpu"}, "vm": {"group": "cpu"}},
        vm={"shared_pass": False},
    )
    assert (
        Job("fm", config).labels == {"group": "gpu"}
        and [job.labels for job in vm_jobs(config)] == [{"group": "cpu"}] * 2
    )
