"""Elastic training on two nodes, one of which dies: the job continues on the remaining CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_head import Head
from test_cluster_jobs import TINY, ended

from exfm_ray.storage.atomic import read_json
from exfm_ray.tracking.recorder import read_metrics
from exfm_ray.training.checkpoint import Checkpoints

WINDOWS = 4
EVENTS = 3000
SYNTHETIC = (
    f"{{windows: {WINDOWS}, events_per_window: {EVENTS}, users: 150, ads: 80, advertisers: 10}}"
)
TRAIN = [
    "train-fm",
    "--config",
    "configs/demo.yaml",
    *(f"--set={setting}" for setting in TINY),
    f"--set=data.synthetic={SYNTHETIC}",
    "--set=fm.batch_size=64",
    "--set=checkpoint.every_examples=300",
]
ELASTIC = ["--set=fm.workers=2", "--set=fm.min_workers=1", "--set=fm.zero_stage=1"]
TOLERANCE = 1e-2


@pytest.fixture
def head() -> Iterator[Head]:
    """A head with a single CPU, which the remaining worker takes; Ray Data has none."""
    head = Head(cpus=1)
    yield head
    head.stop()


def rows_by_curve(run: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows of a run's metrics.jsonl by window, domain and task."""
    rows = read_metrics(run / "metrics.jsonl")
    return {(row["window"], row["domain"], row["task"]): row for row in rows}


@pytest.mark.slow
def test_an_elastic_job_outlives_a_node(head: Head) -> None:
    """Wrong: a node's death ends an elastic job, or the job waits for CPUs that are gone, or
    resumes at another position in the data."""
    node = head.join(cpus=2)
    assert ended(head.submit("--id", "alone", "--", *TRAIN, "--name", "alone"))[0] == 0
    job = head.submit("--id", "elastic", "--", *TRAIN, *ELASTIC, "--name", "elastic")
    run = head.home / "runs" / "elastic"
    while not list((run / "checkpoints").glob("fm/*examples=*/manifest.json")):
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    head.kill(node)
    code, out, errors = ended(job)
    assert code == 0, out + errors
    checkpoints = Checkpoints(run / "checkpoints" / "fm")
    assert [timing.examples for timing in checkpoints.result(checkpoints.latest()).timings] == [
        EVENTS
    ] * WINDOWS
    alone = head.home / "runs" / "alone"
    actual = rows_by_curve(run)
    expected = rows_by_curve(alone)
    assert actual.keys() == expected.keys() and len(actual) > WINDOWS
    for key, row in expected.items():
        assert actual[key]["examples"] == row["examples"]
        assert actual[key]["log_loss"] == pytest.approx(row["log_loss"], rel=TOLERANCE), key
    assert read_json(run / "summary.json")["roles"]["fm"]["examples"] == WINDOWS * EVENTS
