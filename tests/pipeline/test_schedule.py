"""The schedule: which windows each role can work on, from files on disk alone, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from example import make_stream
from small_runs import small_config

from exfm_ray.config.root import Config
from exfm_ray.das.labeler import Labeler
from exfm_ray.data.stream import EventStream
from exfm_ray.pipeline.schedule import ALL_ROLES, Role, Schedule, training_jobs, vm_jobs
from exfm_ray.storage.atomic import write_json
from exfm_ray.training.checkpoint import Manifest
from exfm_ray.training.job import Job

WINDOWS = 4
ONLY_VM = frozenset({Role.VM})
TWO_TEACHERS: dict[str, Any] = {
    "teachers": [{"name": "feed_fm"}],
    "das": {"keep_snapshots": True},
    "vm": {
        "arms": ["labels", "ah"],
        "models": [
            {"name": "feed_fm", "domain": "feed", "task": "click", "published_arm": "ah"},
            {"name": "feed", "domain": "feed", "task": "click", "teacher": "feed_fm"},
        ],
    },
}


def config_of(folder: Path, **changes: Any) -> Config:
    """A run with a prepared stream of four windows, which all have a teacher but the first."""
    settings = {"vm": {"arms": ["labels", "ah"]}, **changes}
    config = small_config(folder, "run", **settings)
    make_stream(config.folder / "stream", windows=WINDOWS, rows=10)
    return config


def schedule_of(config: Config, is_open: bool = True) -> Schedule:
    """The schedule over the stream, which may still grow or is complete."""
    if is_open:
        (config.folder / "stream" / "manifest.json").unlink(missing_ok=True)
    stream = EventStream.open(config.folder / "stream")
    teachers = (None, *config.teachers)
    return Schedule(config, stream, [Labeler(config, stream, teacher) for teacher in teachers])


def publish(config: Config, *versions: int) -> None:
    """Leave the manifests of the FM's snapshots."""
    for version in versions:
        write_json(config.folder / "snapshots" / "fm" / f"version={version:03d}" / "model.json", {})


def supervise(config: Config, *windows: int) -> None:
    """Leave the manifests of the FM's supervision."""
    for window in windows:
        write_json(
            config.folder / "supervision" / "fm" / f"window={window:03d}" / "manifest.json", {}
        )


def finish(job: Job, windows: int) -> None:
    """Leave the manifest of a checkpoint after so many windows."""
    manifest = Manifest(
        windows=windows,
        examples=0,
        workers=1,
        files={},
        teacher=None,
        timings=[],
        underway=None,
        stopping=None,
    )
    path = job.checkpoints.root / f"windows={windows:03d}" / "manifest.json"
    write_json(path, manifest.sealed().model_dump(mode="json"))


def test_roles_and_their_jobs(tmp_path: Path) -> None:
    """Wrong: a command trains what was not requested, or starts the VMs before the FM."""
    config = config_of(tmp_path)
    assert [job.name for job in training_jobs(config, ALL_ROLES)] == ["fm", "vm"]
    assert [job.name for job in training_jobs(config, frozenset({Role.FM}))] == ["fm"]
    assert training_jobs(config, frozenset({Role.DAS})) == []
    assert [str(role) for role in Role] == ["fm", "das", "vm"]


def test_jobs_of_vertical_models(tmp_path: Path) -> None:
    """Wrong: students of two teachers share a job, or separate passes share one."""
    shared = small_config(tmp_path, "shared", **TWO_TEACHERS)
    assert [job.name for job in vm_jobs(shared)] == ["vm", "vm-of-feed_fm"]
    assert [job.teacher for job in vm_jobs(shared)] == ["fm", "feed_fm"]
    apart = small_config(tmp_path, "apart", vm={"shared_pass": False})
    assert [job.name for job in vm_jobs(apart)] == ["vm-feed", "vm-stories"]


def test_students_wait_for_supervision_of_an_open_stream(tmp_path: Path) -> None:
    """Wrong: while a stream grows, a job starts on a window that will not be supervised, or waits
    although the DAS of the same command will."""
    config = config_of(tmp_path)
    (job,) = vm_jobs(config)
    schedule = schedule_of(config)
    assert schedule.learnable_windows(Job("fm", config), ONLY_VM) == [0, 1, 2, 3]
    assert schedule.learnable_windows(job, ONLY_VM) == [0], "window 0 has no teacher"
    assert schedule.learnable_windows(job, ALL_ROLES) == [0, 1, 2, 3]
    supervise(config, 1, 3)
    assert schedule.learnable_windows(job, ONLY_VM) == [0, 1], "window 2 is missing"
    publish(config, 2)
    with_das = frozenset({Role.DAS, Role.VM})
    assert schedule.learnable_windows(job, with_das) == [0, 1, 2, 3]


def test_supervision_of_a_complete_stream_is_checked_elsewhere(tmp_path: Path) -> None:
    """Wrong: at the end of a stream the last windows are silently left out."""
    config = config_of(tmp_path)
    (job,) = vm_jobs(config)
    schedule = schedule_of(config, is_open=False)
    assert not schedule.stream_is_open
    assert schedule.learnable_windows(job, ONLY_VM) == [0, 1, 2, 3]


def test_labels_need_no_teacher(tmp_path: Path) -> None:
    """Wrong: students that learn from labels alone wait for supervision."""
    config = config_of(tmp_path, vm={"arms": ["labels"]})
    (job,) = vm_jobs(config)
    assert schedule_of(config).learnable_windows(job, ONLY_VM) == [0, 1, 2, 3]


def test_shared_rows_need_the_next_snapshot(tmp_path: Path) -> None:
    """Wrong: a student with shared rows is exported before the rows that it is served with exist,
    or waits for a snapshot that the FM of the same command publishes."""
    config = config_of(tmp_path, vm={"arms": ["labels+share"]})
    (job,) = vm_jobs(config)
    schedule = schedule_of(config)
    assert schedule.learnable_windows(job, ALL_ROLES) == [0, 1, 2, 3]
    publish(config, 1, 2, 3)
    with_das = frozenset({Role.DAS, Role.VM})
    assert schedule.learnable_windows(job, with_das) == [0, 1, 2], "window 3 needs snapshot 4"


def test_a_das_scores_windows_whose_snapshot_exists(tmp_path: Path) -> None:
    """Wrong: a DAS repeats a window, or waits for a snapshot that no role makes."""
    config = config_of(tmp_path)
    schedule = schedule_of(config)
    (labeler,) = schedule.labelers
    only_das = frozenset({Role.DAS})
    assert schedule.scorable_windows(labeler, only_das) == []
    assert schedule.scorable_windows(labeler, ALL_ROLES) == [1, 2, 3]
    publish(config, 1, 2)
    supervise(config, 1)
    assert schedule.scorable_windows(labeler, only_das) == [2]
    complete = schedule_of(config_of(tmp_path / "other"), is_open=False)
    assert complete.scorable_windows(complete.labelers[0], only_das) == [1, 2, 3]


def test_only_the_fm_publishes_for_its_own_das(tmp_path: Path) -> None:
    """Wrong: the DAS of another teacher counts on snapshots that the FM publishes."""
    config = config_of(tmp_path, **TWO_TEACHERS)
    schedule = schedule_of(config)
    of_fm, of_student = schedule.labelers
    assert schedule.scorable_windows(of_fm, ALL_ROLES) == [1, 2, 3]
    assert schedule.scorable_windows(of_student, ALL_ROLES) == []


def test_finished_work_is_left_out(tmp_path: Path) -> None:
    """Wrong: a command repeats a job that is done, or starts a DAS that has nothing to score."""
    config = config_of(tmp_path)
    fm, vm = training_jobs(config, ALL_ROLES)
    schedule = schedule_of(config)
    everything = schedule.workload([fm, vm], ALL_ROLES)
    assert everything.jobs == [fm, vm]
    assert everything.scoring == {"das": [1, 2, 3]}
    assert everything.jobs_taught_by("fm") == [vm]
    finish(fm, WINDOWS)
    supervise(config, 1, 2, 3)
    rest = schedule.workload([fm, vm], ALL_ROLES)
    assert rest.jobs == [vm] and rest.scoring == {}
    assert rest.learnable["vm"] == [0, 1, 2, 3] and not rest.is_empty
    finish(vm, WINDOWS)
    assert schedule.workload([fm, vm], ALL_ROLES).is_empty


@pytest.mark.parametrize(("learned", "blocked"), [(1, False), (2, True)])
def test_a_job_is_blocked_by_its_next_window(
    tmp_path: Path,
    learned: int,
    blocked: bool,
) -> None:
    """Wrong: a run whose DAS has failed stops before everything possible is learned, or waits
    forever for supervision."""
    config = config_of(tmp_path)
    fm, vm = training_jobs(config, ALL_ROLES)
    schedule = schedule_of(config)
    supervise(config, 1, 3)
    finish(vm, learned)
    learnable = {"fm": [0, 1, 2, 3], "vm": [0, 1, 2, 3]}
    assert schedule.is_blocked(vm, learnable) is blocked
    assert not schedule.is_blocked(fm, learnable)
    supervise(config, 2)
    assert not schedule.is_blocked(vm, learnable)


def test_a_das_is_blocked_with_its_teacher(tmp_path: Path) -> None:
    """Wrong: a run waits for the DAS of a teacher that cannot be trained any more."""
    config = config_of(tmp_path, **TWO_TEACHERS)
    schedule = schedule_of(config)
    of_fm, of_student = schedule.labelers
    assert schedule.is_blocked(of_student, {})
    assert not schedule.is_blocked(of_fm, {})
