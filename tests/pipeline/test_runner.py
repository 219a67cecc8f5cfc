"""Whole runs on Ray: equal to the roles in turn without Ray, ended by an error, killed, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboard_spec import logged, named
from local_runs import run_locally
from s3_server import S3
from small_runs import SETTINGS, WINDOWS, assert_close, figures, merged, metrics, run, small_config
from wandb_files import OfflineRun, run_files
from workers import Workers

from exfm_ray.cli.main import main
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import source_schema
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.runner import PipelineRunner
from exfm_ray.runtime.session import user_error
from exfm_ray.storage.atomic import read_json, read_jsonl
from exfm_ray.tracking.dashboard import sections
from exfm_ray.tracking.run_files import RunFiles
from exfm_ray.training.job import Job

REPOSITORY = Path(__file__).parents[2]
RUN_S = 300
ARMS = ("labels", "kd", "ah_sa", "ah+share+history")
"""Arms that use all that the roles exchange: predictions, table rows, representations."""


def config_of(
    folder: Path,
    name: str,
    **changes: Any,
) -> Config:
    """The tiny run with these arms."""
    return small_config(folder, name, **merged({"vm": {"arms": ARMS}}, changes))


@pytest.fixture(scope="module")
def base(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An undisturbed run, the roles in turn, without Ray."""
    config = config_of(tmp_path_factory.mktemp("base"), "base")
    run_locally(groups, config)
    return config


def assert_same(config: Config, base: Config) -> None:
    """Assert equal rows and figures, to the bit: one thread, one worker, one order of the rows."""
    assert metrics(config) == metrics(base)
    assert figures(config) == figures(base)


def test_side_by_side_on_ray_equals_in_turn(
    cluster: None,
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: side by side, a role sees too much or too little or the feed loses the order, or a
    repeated command repeats the work."""
    config = config_of(tmp_path, "ray", wandb={"mode": "offline"})
    summary = run(config)
    assert_same(config, base)
    assert (
        len(run_files(config.folder)) == 1 + 2 * len(config.vm.arms) + 1
    )  # the FM, two students, the DAS
    roles = summary["roles"]
    assert {name: role["examples"] for name, role in roles.items()} == {
        "fm": 3600,
        "das": 2700,
        "vm": roles["vm"]["examples"],
    }
    assert all(role["seconds"] > 0 for role in roles.values())
    assert summary["peak_memory_bytes"] > 0
    assert_timeline(config)
    assert_dashboard(config)
    files = {
        path: path.stat().st_mtime_ns
        for path in config.folder.rglob("*")
        if path.is_file() and path.parent.name != "stream"
    }
    repeated = run(config)
    assert repeated == summary
    assert len(run_files(config.folder)) == 1 + 2 * len(config.vm.arms) + 1
    for path, time_ns in files.items():
        assert path.name in ("config.yaml", "summary.json") or path.stat().st_mtime_ns == time_ns, (
            path
        )


def assert_dashboard(config: Config) -> None:
    """Assert that every panel about a pipeline shows figures that its runs have logged."""
    left_out = (
        b"feed labels",
        b"feed kd",
        b"stories labels",
        b"stories kd",
    )  # they log the same as the others
    paths = [
        path
        for path in run_files(config.folder).values()
        if not any(name in path.read_bytes() for name in left_out)
    ]
    runs = [OfflineRun(path) for path in paths]
    assert {run.start["job_type"] for run in runs} == {"fm", "das", "vm"}
    for section in sections(config, source_schema(config)):
        available = logged(run for run in runs if run.start["job_type"] in section.job_types)
        for panel in section.panels:
            shown = named(
                json.loads(panel._to_model().model_dump_json(by_alias=True, exclude_none=True))
            )
            assert shown and shown <= available, (section.name, shown - available)


def assert_timeline(config: Config) -> None:
    """Assert that every pass of every role is listed once and the DAS waited for its teacher."""
    spans = {
        (span["role"], span["window"], span["phase"]): span
        for span in read_jsonl(config.folder / "timeline.jsonl")
    }
    passes = {
        (role, window, phase)
        for role in ("fm", "vm")
        for window in range(WINDOWS)
        for phase in ("evaluate", "learn")
    }
    assert spans.keys() == passes | {("das", window, "score") for window in range(1, WINDOWS)}
    for window in range(1, WINDOWS):
        scored = spans["das", window, "score"]
        assert (
            scored["started_s"] + scored["waited_s"]
            >= spans["fm", window - 1, "learn"]["ended_s"] - 0.05
        ), "two clocks of one machine"
    assert spans["das", 1, "score"]["waited_s"] > 0


@pytest.mark.slow
def test_stores_on_s3_equal_local_ones(
    cluster: None,
    base: Config,
    s3: S3,
    tmp_path: Path,
) -> None:
    """Wrong: with stream, snapshots, supervision, rows and histories on S3 a role reads or writes
    other bytes, something stays local, or a run uses the stores of another one."""
    storage = s3.url(tmp_path.name)
    config = config_of(tmp_path, "base", run={"dir": tmp_path / "runs", "storage": storage})
    run(config)
    assert_same(config, base)
    folders = ("stream", "supervision", "shared", "history", "snapshots")
    assert not any((config.folder / part).exists() for part in folders)
    for part in folders:
        local = base.folder / part
        remote = config.stores / part
        files = {
            str(path.relative_to(local)): path.read_bytes()
            for path in local.rglob("*")
            if path.is_file()
        }
        remote_files = {
            "/".join(path.parts[len(remote.parts) :]): path.read_bytes()
            for path in remote.rglob("*")
            if not path.name.endswith(".sha256")
        }
        assert remote_files and remote_files.items() <= files.items(), part
        # Snapshots that no window needs any more are deleted.
        assert part == "snapshots" or remote_files.keys() == files.keys(), part
    assert RunFiles.open(config.folder).state == "done"
    assert not any(
        "hidden-in-the-tests" in path.read_text(errors="ignore")
        for path in config.folder.rglob("*")
        if path.is_file()
    )
    other = config_of(
        tmp_path, "base", run={"dir": tmp_path / "others", "storage": storage}, seed=1
    )
    with pytest.raises(
        UserError,
        match=(
            r"s3://.*/base/config.yaml: a run with other settings has its stores there; "
            "choose another --name"
        ),
    ):
        PipelineRunner(other, EventStream.open(config.stores / "stream")).execute()


def test_two_workers_on_ray_equal_one(
    cluster: None,
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: two Ray Train workers learn other rows than one."""
    config = config_of(tmp_path, "two", fm={"workers": 2}, vm={"workers": 2})
    run(config)
    rows = metrics(config)
    assert rows.keys() == metrics(base).keys()
    # The tolerance of tests/training/test_jobs.py: rounding of sums over two workers in 60 steps.
    assert_close(list(rows.values()), [metrics(base)[key] for key in rows], 1e-3)


@pytest.mark.slow
def test_a_run_resumes_after_its_damaged_fragment_is_repaired(
    cluster: None,
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: an error in one role leaves the others waiting forever, is reported as another error,
    or damages the run."""
    config = config_of(tmp_path, "damaged")
    stream = prepare_stream(config)
    path = stream.path(2, stream.window(2).fragments[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    started = time.monotonic()
    with pytest.raises(Exception, match=r".*") as caught:
        PipelineRunner(config, stream).execute()
    error = user_error(caught.value)
    assert error is not None
    assert f"{path}: 100 bytes where the manifest says {len(whole)}" in str(error)
    assert time.monotonic() - started < 100, "the other roles did not end"
    error_file = config.folder / "logs" / "error.txt"
    assert f"{path}: 100 bytes" in error_file.read_text()
    path.write_bytes(whole)
    run(config)
    assert not error_file.exists()
    assert_same(config, base)


@pytest.mark.slow
def test_a_failed_window_is_reported(
    cluster: None,
    base: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: a run with a window without supervision exits with 0, stops before everything possible
    is done, or reports nothing; or the summary still lists the window once it is scored."""
    config = config_of(tmp_path, "failed", das={"max_attempts": 2, "max_windows_ahead": 1})
    prepare_stream(config)
    file = tmp_path / "failed.yaml"
    full = config.folder / "supervision" / "fm" / "window=002"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    full.parent.mkdir(parents=True)
    full.touch()  # no folder can be created here
    assert main(["pipeline", "--config", str(file)]) == 2
    assert "no supervision of window(s) 2" in capsys.readouterr().err
    assert [
        Job("vm", config).checkpoints.latest().windows,
        Job("fm", config).checkpoints.latest().windows,
    ] == [2, WINDOWS]
    failed = read_json(config.folder / "summary.json")["failed_items"]
    assert min(row["window"] for row in failed) == 2
    assert {row["teacher"] for row in failed} == {"fm"}
    assert "window 2, fragment=" in (config.folder / "report.html").read_text()
    full.unlink()
    assert main(["pipeline", "--config", str(file)]) == 0
    assert read_json(config.folder / "summary.json")["failed_items"] == []
    assert 'class="missing"' not in (config.folder / "report.html").read_text()
    assert_same(config, base)


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """Start `run.py pipeline` on the tiny stream in another process."""
    file = folder / "config.yaml"
    file.write_text(
        yaml.safe_dump(merged(SETTINGS, {"run": {"dir": str(folder)}, "vm": {"arms": list(ARMS)}}))
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "run.py", "pipeline", "--config", str(file), "--name", name]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def kill_and_resume(config: Config, moments: list[int | float]) -> None:
    """Kill the driver at each moment, restart it, and finally let it finish.

    A moment is a number of lines in metrics.jsonl (int) or of seconds after the start (float).
    """
    path = config.folder / "metrics.jsonl"
    for moment in moments:
        process = start(config.run.dir, config.name)
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < RUN_S:
            lines = len(path.read_bytes().splitlines()) if path.exists() else 0
            if lines >= moment if isinstance(moment, int) else time.monotonic() - started >= moment:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    out, errors = start(config.run.dir, config.name).communicate(timeout=RUN_S)
    assert b"Traceback" not in errors, errors.decode()
    assert b"NE gain" in out


@pytest.mark.slow
def test_resumes_after_a_kill(base: Config, tmp_path: Path) -> None:
    """Wrong: after the driver was killed, a partial file is read, or work is repeated or left out
    (rule 5)."""
    config = config_of(tmp_path, "killed")
    kill_and_resume(config, [20])
    assert_same(config, base)
    assert read_json(config.folder / "summary.json")["roles"]["fm"]["examples"] == WINDOWS * 900


@pytest.mark.slow
def test_resumes_after_kills_at_any_moment(base: Config, tmp_path: Path) -> None:
    """Wrong: as above, at arbitrary moments: during the start, the preparation of the stream, a
    checkpoint."""
    config = config_of(tmp_path, "killed")
    kill_and_resume(config, [1.0, 6.0, 14.0, 1, 20.0, 20, 40])
    assert_same(config, base)
