"""A job on Ray for whose workers there is no room."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import small_config

from exfm_ray.errors import UserError
from exfm_ray.training import launch
from exfm_ray.training.job import Job


def test_no_room_for_a_jobs_workers(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a job gives up at the first try, so that no node can join in time, or ends in Ray Train's traceback."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "0.5")
    monkeypatch.setattr(launch, "START_TRIES", 2)
    job = Job("fm", small_config(tmp_path, "large", fm={"workers": 99}))
    with pytest.raises(UserError, match=r"fm waited 3 minutes for room for its workers \(a CPU each\).*lower fm.workers"):
        launch.run_job(job, [0], None, None)
