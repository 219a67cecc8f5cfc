"""Runs that reset unused rows: what they publish and export, with two workers and after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_runs import train
from safetensors.torch import load_file
from small_runs import WINDOWS, assert_close, metrics, small_config
from workers import Workers

from exfm_ray.config.root import Config
from exfm_ray.data.stream import EventStream, list_values
from exfm_ray.models.embeddings import initial_table
from exfm_ray.models.serialization import load_model
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.training.job import Job

WORKERS_TOLERANCE = 1e-3  # as in test_jobs


def churning(
    folder: Path,
    name: str,
    after: int | None,
    workers: int = 1,
) -> Config:
    """FM and two VMs on a stream that half of the ads and users leave in each window.

    The VMs learn labels only, so they need no FM.
    """
    trainer: dict[str, Any] = {"evict_after_windows": after, "workers": workers}
    models = [{"name": domain, "domain": domain, "task": "click"} for domain in ("feed", "search")]
    config = small_config(
        folder,
        name,
        data={"synthetic": {"churn": 0.5}},
        fm=trainer,
        vm={**trainer, "arms": ["labels"], "models": models},
    )
    prepare_stream(config)
    return config


def jobs(config: Config) -> list[Job]:
    """The jobs of the FM and of the VMs."""
    return [Job("fm", config), *vm_jobs(config)]


def run(
    groups: dict[int, Workers],
    config: Config,
    *dies_at: int | None,
) -> None:
    """Run all jobs to the end; before, kill them in each window of `dies_at`."""
    for job in jobs(config):
        for window in (*dies_at, None):
            groups[config.fm.workers].run(train, job, list(range(WINDOWS)), window)


def used(
    config: Config,
    table: str,
    feature: int,
    windows: range,
    domain: int | None,
) -> set[int]:
    """Rows of a table that a domain's examples used in some windows.

    Only one single-valued feature may read the table.
    """
    stream = EventStream.open(config.folder / "stream")
    found = set()
    assert [f.name for f in stream.schema.features if table in (f.name, f.table)] == [table]
    for rows in (
        stream.read(window, fragment)
        for window in windows
        for fragment in stream.window(window).fragments
    ):
        ids_N = list_values(rows["sparse"], len(stream.schema.single))[:, feature]
        found |= set(
            ids_N[
                (rows["domain"].to_numpy() == domain) if domain is not None else slice(None)
            ].tolist()
        )
    return found


@pytest.mark.parametrize("after", [1, 2])
def test_unused_rows_are_reset_in_stored_models(
    groups: dict[int, Workers],
    tmp_path: Path,
    after: int,
) -> None:
    """Wrong: rows of users that have left keep their weights, those of active users lose them, or a
    VM counts the use in other domains."""
    config = churning(tmp_path, "run", after)
    run(groups, config)
    for folder, domain in (
        (config.folder / "snapshots" / "fm" / f"version={WINDOWS:03d}", None),
        (config.folder / "exported" / "search-labels", 1),
    ):
        model, stored = load_model(folder)
        assert [f.name for f in stored.example.single].index("user") == 0
        table = model.tables.tables()["user"]
        active = used(config, "user", 0, range(WINDOWS - after, WINDOWS), domain)
        stale = used(config, "user", 0, range(WINDOWS), domain) - active
        changed = set(
            torch.nonzero((table != initial_table("user", *table.shape, config.seed)).any(dim=1))
            .flatten()
            .tolist()
        )
        assert len(stale) > 20
        assert changed == active


def saved_usage(job: Job) -> set[str]:
    """Names of the tensors of row usage in the last checkpoint."""
    names = load_file(
        job.checkpoints.folder(job.checkpoints.latest()) / "state.rank0000.safetensors"
    )
    return {name for name in names if name.startswith("usage/")}


@pytest.mark.parametrize("workers", [1, 2])
def test_resumes_after_a_kill(
    groups: dict[int, Workers],
    tmp_path: Path,
    workers: int,
) -> None:
    """Wrong: the use of rows before a kill is lost, so they are never reset; or workers disagree on
    what to reset."""
    whole, killed, never = (
        churning(tmp_path, *case, workers)
        for case in (("whole", 1), ("killed", 1), ("never", None))
    )
    run(groups, whole)
    run(groups, killed, 0, 2)
    run(groups, never)
    assert metrics(killed) == metrics(whole)
    files = sorted(
        path.relative_to(whole.folder)
        for name in ("snapshots", "exported")
        for path in (whole.folder / name).rglob("*.safetensors")
    )
    assert len(files) == (WINDOWS + 2) * (workers + 1)
    for file in files:
        assert (killed.folder / file).read_bytes() == (whole.folder / file).read_bytes(), file
    for job in jobs(whole):
        names = ["fm"] if job.role == "fm" else ["feed", "search"]
        assert saved_usage(job) == {
            f"usage/{name}/{part}" for name in names for part in ("last", "window")
        }
    assert not any(saved_usage(job) for job in jobs(never))
    last = [row["log_loss"] for key, row in metrics(whole).items() if key[0] == WINDOWS - 1]
    assert not np.isclose(
        last,
        [row["log_loss"] for key, row in metrics(never).items() if key[0] == WINDOWS - 1],
        rtol=1e-6,
    ).any()


def test_two_workers_equal_one(groups: dict[int, Workers], tmp_path: Path) -> None:
    """Wrong: a worker marks only its slice of the examples, or resets rows of the other's shard."""
    one = churning(tmp_path, "one", 1)
    two = churning(tmp_path, "two", 1, workers=2)
    for config in (one, two):
        run(groups, config)
    assert_close(
        list(metrics(two).values()), [metrics(one)[key] for key in metrics(two)], WORKERS_TOLERANCE
    )
