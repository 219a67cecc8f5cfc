"""Training that is killed anywhere and resumes: bit for bit, with other numbers of workers, past
damaged checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from local_runs import DiedError, files, train, with_inputs
from small_runs import WINDOWS, assert_close, metrics, small_config
from workers import Workers

import exfm_ray.training.publisher as publisher_module
from exfm_ray.config.root import Config
from exfm_ray.models.serialization import load_model
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.training.checkpoint import Cursor
from exfm_ray.training.job import Job

EVERY = {"checkpoint": {"every_examples": 150}}  # batches are of 64, so every third one
WORKERS_TOLERANCE = 1e-3
"""As in test_jobs.py: sums over two workers are rounded differently, and the optimizers carry the
difference on."""


def kill_and_resume(
    groups: dict[int, Workers],
    config: Config,
    job: Job,
) -> list[Cursor]:
    """Kill a job inside windows, with and without a checkpoint there, and before a window's
    checkpoint; then let it end.

    Returns:
        How far the job was at its newest checkpoint after each kill.
    """
    cursors = []
    for window, batches in ((0, 2), (1, 3), (1, 7), (1, None), (2, 5), (3, 1)):
        groups[job.trainer.workers].run(train, job, list(range(WINDOWS)), window, batches)
        cursors.append(job.checkpoints.latest())
    groups[job.trainer.workers].run(train, job, list(range(WINDOWS)), None)
    return cursors


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_the_fm_resumes_inside_a_window_bit_for_bit(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
    workers: int,
    stage: int,
) -> None:
    """Wrong: a checkpoint inside a window is not the whole state, an example is learned twice or
    never, or a row of metrics is lost or doubled."""
    fm = {
        "workers": workers,
        "zero_stage": stage,
        "optimizer": {"ema": 0.9 if stage < 3 else 0.0},
        "evict_after_windows": 1,
    }
    whole, killed = (
        with_inputs(base, tmp_path, name, fm=fm, **EVERY) for name in ("whole", "killed")
    )
    groups[workers].run(train, Job("fm", whole), list(range(WINDOWS)), None)
    cursors = kill_and_resume(groups, killed, Job("fm", killed))
    assert cursors == [
        Cursor(0),
        Cursor(1, 192, 1),
        Cursor(1, 384, 1),
        Cursor(1, 768, 1),
        Cursor(2, 192, 1),
        Cursor(3),
    ]
    assert metrics(killed) == metrics(whole)
    assert files(killed, "snapshots") == files(whole, "snapshots")
    states = [Job("fm", config).checkpoints.result(Cursor(WINDOWS)) for config in (killed, whole)]
    assert [timing.examples for timing in states[0].timings] == [900] * WINDOWS
    assert {k: v.figures() for k, v in states[0].states.items()} == {
        k: v.figures() for k, v in states[1].states.items()
    }


def test_every_arm_of_a_vm_resumes_inside_a_window_bit_for_bit(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: as above, for a head, an adapter or the order of two students' batches."""
    vm = {"workers": 2, "zero_stage": 1}
    whole, killed = (
        with_inputs(base, tmp_path, name, "supervision", vm=vm, **EVERY)
        for name in ("whole", "killed")
    )
    (job,), (other,) = vm_jobs(whole), vm_jobs(killed)
    groups[2].run(train, job, list(range(WINDOWS)), None)
    kill_and_resume(groups, killed, other)
    assert metrics(killed) == metrics(whole)
    assert files(killed, "exported") == files(whole, "exported") and len(
        files(whole, "exported")
    ) == 2 * 4 * (2 + 1)


@pytest.mark.parametrize("workers", [(1, 2), (2, 1)])
def test_resumes_with_another_number_of_workers(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
    workers: tuple[int, int],
) -> None:
    """Wrong: tables or ZeRO's partitions are joined wrongly, or the job resumes elsewhere."""
    for number, (count, stage) in enumerate(zip(workers, (3, 1), strict=True)):
        trainer = {
            "workers": count,
            "zero_stage": stage,
            "sharding": "row_wise" if number else "table_wise",
        }
        config = small_config(tmp_path, "run", fm=trainer, vm=trainer, **EVERY)
        if not number:
            config = with_inputs(
                base, tmp_path, "run", "supervision", fm=trainer, vm=trainer, **EVERY
            )
        for job in (Job("fm", config), *vm_jobs(config)):
            groups[count].run(train, job, list(range(WINDOWS)), *((None,) if number else (2, 5)))
            assert job.checkpoints.latest() == (
                Cursor(WINDOWS) if number else Cursor(2, job.checkpoints.latest().examples, 1)
            )
    assert metrics(config).keys() == metrics(base).keys()
    assert_close(
        list(metrics(config).values()),
        [metrics(base)[key] for key in metrics(config)],
        WORKERS_TOLERANCE,
    )


def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: a changed, cut or missing file of a checkpoint is read or ends the run, or the damage
    is not reported."""
    config = with_inputs(base, tmp_path, "run", checkpoint={"keep": 4})
    job = Job("fm", config)
    groups[1].run(train, job, list(range(WINDOWS)), None)
    names = ["windows=004", "windows=003", "windows=002"]
    for name, damage in zip(names, (flip, cut, os.remove), strict=True):
        damage(job.checkpoints.root / name / "state.rank0000.safetensors")
    messages = list(job.checkpoints.set_aside_damaged())
    assert len(messages) == 3
    assert job.checkpoints.latest() == Cursor(1)
    damage = "state.rank0000.safetensors is not the file that manifest.json describes"
    assert f"windows=004 is damaged ({damage})" in messages[0]
    assert "is missing); training resumes from windows=001" in messages[2]
    assert list(job.checkpoints.set_aside_damaged()) == []
    (config.folder / "metrics.jsonl").unlink()
    groups[1].run(train, job, list(range(WINDOWS)), None)
    fm = {
        key: row for key, row in metrics(base).items() if row["role"] == "fm" and row["window"] > 0
    }
    assert metrics(config) == fm
    assert files(config, "snapshots") == files(base, "snapshots")


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Keep the first half."""
    os.truncate(path, path.stat().st_size // 2)


def die_in_commit(job: Job, windows: list[int]) -> None:
    """Train, and die instead of committing the first model."""

    def die(*_: Any) -> None:
        raise DiedError

    commit = publisher_module.commit_model
    publisher_module.commit_model = die
    try:
        train(job, windows, None)
    finally:
        publisher_module.commit_model = commit


def test_fewer_workers_publish_over_the_files_of_more(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: files of a former worker get into the next snapshot of the same version, which cannot
    be loaded; or the old manifest stays while its files are replaced."""
    changes: dict[str, Any] = {"vm": {"arms": ["labels+share"]}}
    config = with_inputs(base, tmp_path, "run", fm={"workers": 2}, **changes)
    windows = list(range(WINDOWS))
    store = SnapshotStore.from_config(config)
    groups[2].run(train, Job("fm", config), windows, 2)
    assert store.has(3) and len(list(store.folder(3).glob("*.safetensors"))) == 2 * 2 + 1  # type: ignore[arg-type]
    job = Job("fm", small_config(tmp_path, "run", **changes))
    groups[1].run(die_in_commit, job, windows)
    assert job.checkpoints.latest() == Cursor(2) and not store.has(3)
    groups[1].run(train, job, windows, None)
    assert sorted(load_model(store.folder(3))[1].files) == [
        "dense.safetensors",
        "momentum.0000.safetensors",
        "tables.0000.safetensors",
    ]


def test_fewer_workers_export_over_the_files_of_more(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: as above, for an export, when a followed stream has more windows and the job has fewer
    workers than before."""
    vm = {"arms": ["labels"], "models": [base.vm.models[0].model_dump(mode="json")]}
    config = with_inputs(base, tmp_path, "run", vm={**vm, "workers": 2})
    groups[2].run(train, *vm_jobs(config), [0, 1], None)
    groups[1].run(train, *vm_jobs(small_config(tmp_path, "run", vm=vm)), [0, 1, 2], None)
    _, manifest = load_model(config.folder / "exported" / "feed-labels")
    assert manifest.facts["windows"] == 3 and sorted(manifest.files) == [
        "dense.safetensors",
        "tables.0000.safetensors",
    ]
