"""Training that is ended anywhere and goes on: to the bit, with other numbers of workers, past
damaged checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from local_runs import DiedError, files, train, with_inputs
from small_runs import WINDOWS, assert_close, metrics, small_config
from workers import Workers

import exfm_ray.training.worker as worker_module
from exfm_ray.config.root import Config
from exfm_ray.models.serialization import load_model
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.training.checkpoint import Cursor
from exfm_ray.training.job import Job

EVERY = {"checkpoint": {"every_examples": 150}}  # batches are of 64, so every third one
WORKERS_TOLERANCE = 1e-3
"""That of test_jobs.py: sums over two workers are rounded otherwise, and the optimizers carry it
on."""


def kill_and_go_on(
    groups: dict[int, Workers],
    config: Config,
    job: Job,
) -> list[Cursor]:
    """Kill a job inside windows, where there is a checkpoint and where there is none, and before a
    window's checkpoint; let it end."""
    marks = []
    for window, batches in ((0, 2), (1, 3), (1, 7), (1, None), (2, 5), (3, 1)):
        groups[job.trainer.workers].run(train, job, list(range(WINDOWS)), window, batches)
        marks.append(job.checkpoints.latest())
    groups[job.trainer.workers].run(train, job, list(range(WINDOWS)), None)
    return marks


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_the_fm_goes_on_inside_a_window_to_the_bit(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
    workers: int,
    stage: int,
) -> None:
    """Wrong: a checkpoint inside a window lacks something, an example is learnt twice or not at
    all, a row of metrics is lost or doubled."""
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
    marks = kill_and_go_on(groups, killed, Job("fm", killed))
    assert marks == [
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


def test_every_arm_of_a_vm_goes_on_inside_a_window_to_the_bit(
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
    kill_and_go_on(groups, killed, other)
    assert metrics(killed) == metrics(whole)
    assert files(killed, "exported") == files(whole, "exported") and len(
        files(whole, "exported")
    ) == 2 * 4 * (2 + 1)


@pytest.mark.parametrize("workers", [(1, 2), (2, 1)])
def test_goes_on_with_another_number_of_workers(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
    workers: tuple[int, int],
) -> None:
    """Wrong: tables or ZeRO's partitions are put together wrongly, or the place in the data is
    another one."""
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


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: a changed, cut or missing file of a checkpoint is read, or ends the run; or the damage
    is not told."""
    config = with_inputs(base, tmp_path, "run", checkpoint={"keep": 4})
    job = Job("fm", config)
    groups[1].run(train, job, list(range(WINDOWS)), None)
    names = ["windows=004", "windows=003", "windows=002"]
    for name, damage in zip(names, (flip, cut, os.remove), strict=True):
        damage(job.checkpoints.root / name / "state.rank0000.safetensors")
    told = list(job.checkpoints.set_aside_damaged())
    assert len(told) == 3 and job.checkpoints.latest() == Cursor(1)
    assert (
        "windows=004 is damaged (state.rank0000.safetensors is not the file that manifest.json describes)"
        in told[0]
    )
    assert "is missing); the one before, windows=001, is gone on from" in told[2]
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
    """Train until the first model is to be committed."""

    def die(*_: Any) -> None:
        raise DiedError

    commit = worker_module.commit_model
    worker_module.commit_model = die
    try:
        train(job, windows, None)
    finally:
        worker_module.commit_model = commit


def test_fewer_workers_publish_over_what_more_have_left(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: files of a worker that is gone are taken into the next snapshot of the same version,
    which nobody can load; or the manifest of the one before stands while its files are replaced."""
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


def test_fewer_workers_export_over_what_more_have_left(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: as above, of what is served, when a followed stream has more windows and the job fewer
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
