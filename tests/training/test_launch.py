"""Jobs on Ray that end in an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from small_runs import small_config

from exfm_ray.errors import UserError
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.training import launch
from exfm_ray.training.job import Job


def test_no_resources_for_a_jobs_workers(
    cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a job gives up at the first attempt, so no node can join in time, or ends in Ray
    Train's traceback."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "0.5")
    monkeypatch.setattr(launch, "START_TRIES", 2)
    job = Job("fm", small_config(tmp_path, "large", fm={"workers": 99}))
    with pytest.raises(
        UserError,
        match=r"fm: no resources for its workers after 3 minutes \(1 CPU each\).*lower fm.workers",
    ):
        launch.run_job(job, [0], None, None)


def test_a_mistake_ends_an_elastic_job_at_once(cluster: None, tmp_path: Path) -> None:
    """Wrong: an elastic job reads a damaged fragment six times, or its error is a nested
    traceback."""
    config = small_config(tmp_path, "damaged", fm={"min_workers": 1})
    stream = prepare_stream(config)
    path = stream.path(0, stream.window(0).fragments[0])
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    job = Job("fm", config)
    feed = launch.start_feed(job, [0])
    try:
        with pytest.raises(UserError) as caught:
            launch.run_job(job, [0], None, feed)
    finally:
        ray.kill(feed)
    message = str(caught.value)
    assert message.startswith(f"{path}: 100 bytes where the manifest says {len(whole)}")
    assert "\n" not in message
