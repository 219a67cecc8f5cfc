"""Elastic training on two nodes of which one dies: the job goes on by itself on the CPU that is
left."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from ray_head import Head
from test_cluster_jobs import TINY, ended

from exfm_ray.storage.atomic import read_json
from exfm_ray.tracking.recorder import read_metrics
from exfm_ray.training.checkpoint import Checkpoints

WINDOWS = 4
EVENTS = 3000
TRAIN = [
    "train-fm",
    "--config",
    "configs/demo.yaml",
    *(f"--set={setting}" for setting in TINY),
    f"--set=data.synthetic={{windows: {WINDOWS}, events_per_window: {EVENTS}, users: 150, ads: 80, advertisers: 10}}",
    "--set=fm.batch_size=64",
    "--set=checkpoint.every_examples=300",
]
ELASTIC = ["--set=fm.workers=2", "--set=fm.min_workers=1", "--set=fm.zero_stage=1"]
TOLERANCE = 1e-2


@pytest.fixture
def head() -> Iterator[Head]:
    """A head with a single CPU: what is left of the job there takes it, and Ray Data has none."""
    head = Head(cpus=1)
    yield head
    head.stop()


@pytest.mark.slow
def test_an_elastic_job_outlives_a_node(head: Head) -> None:
    """Wrong: a node's death ends an elastic job, or it waits for CPUs that are gone, or goes on at
    another place in the data."""
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
    found, expected = (
        {
            (row["window"], row["domain"], row["task"]): row
            for row in read_metrics(r / "metrics.jsonl")
        }
        for r in (run, alone)
    )
    assert found.keys() == expected.keys() and len(found) > WINDOWS
    for key, row in expected.items():
        assert found[key]["examples"] == row["examples"]
        assert found[key]["log_loss"] == pytest.approx(row["log_loss"], rel=TOLERANCE), key
    assert read_json(run / "summary.json")["roles"]["fm"]["examples"] == WINDOWS * EVENTS
