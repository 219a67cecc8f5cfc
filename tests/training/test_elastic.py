"""An elastic job on Ray that loses a worker resumes by itself."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_runs import metrics, run, small_config

from exfm_ray.config.root import Config
from exfm_ray.training.job import Job

TOLERANCE = 1e-2
"""Rounding that a ReLU's kink enlarges in a toy model: up to 0.4 % of a figure was observed.

See docs/guarantees.md."""
SIZES = {"synthetic": {"windows": 4, "events_per_window": 3000}}


def kill_a_worker(config: Config, killed: list[int]) -> None:
    """Kill one of this session's Ray Train workers once there is a checkpoint inside a window."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(
        (config.folder / "checkpoints").glob("fm/*examples=*/manifest.json")
    ):
        time.sleep(0.02)
    workers = [
        p
        for p in psutil.Process().children(recursive=True)
        if "TrainWorker" in " ".join(p.cmdline())
    ]
    if workers:
        workers[-1].send_signal(signal.SIGKILL)
        killed.append(workers[-1].pid)


@pytest.mark.slow
def test_an_elastic_job_survives_the_loss_of_a_worker(cluster: None, tmp_path: Path) -> None:
    """Wrong: the loss of a worker ends an elastic job, or the job resumes at another batch."""
    elastic: dict[str, Any] = {
        "fm": {"workers": 2, "min_workers": 1, "zero_stage": 1},
        "checkpoint": {"every_examples": 300},
    }
    config = small_config(tmp_path, "elastic", data=SIZES, **elastic)
    alone = small_config(tmp_path, "alone", data=SIZES)
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(config, killed), daemon=True)
    killer.start()
    run(config, "fm")
    killer.join()
    assert killed, "no worker was killed"
    run(alone, "fm")
    job = Job("fm", config)
    assert [
        timing.examples for timing in job.checkpoints.result(job.checkpoints.latest()).timings
    ] == [3000] * 4
    rows = metrics(config)
    expected = metrics(alone)
    assert rows.keys() == expected.keys() and len(rows) > 0
    for key, row in expected.items():
        assert rows[key]["examples"] == row["examples"]
        assert rows[key]["log_loss"] == pytest.approx(row["log_loss"], rel=TOLERANCE), key
