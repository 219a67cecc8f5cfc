"""Whole runs on Ray: equal to the roles in turn without it, ended by an error, killed, gone on
with."""

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
from exfm_ray.tracking.dashboard import parts
from exfm_ray.tracking.run_files import RunFiles
from exfm_ray.training.job import Job

REPOSITORY = Path(__file__).parents[2]
RUN_S = 300
ARMS = ("labels", "kd", "ah_sa", "ah+share+history")
"""All that the roles hand to each other: predictions, table rows, representations."""


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
    """The same rows and the same figures, to the bit: one thread, one worker, one order of the
    rows."""
    assert metrics(config) == metrics(base)
    assert figures(config) == figures(base)


def test_side_by_side_on_ray_equals_in_turn(
    cluster: None,
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: running the roles side by side lets one see too much or too little, or the feed loses
    the order; or a command given again does the work again."""
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
    again = run(config)
    assert again == summary and len(run_files(config.folder)) == 1 + 2 * len(config.vm.arms) + 1
    for path, time_ns in files.items():
        assert path.name in ("config.yaml", "summary.json") or path.stat().st_mtime_ns == time_ns, (
            path
        )


def assert_dashboard(config: Config) -> None:
    """Every panel about a pipeline asks for what its runs have logged."""
    left_out = (
        b"feed labels",
        b"feed kd",
        b"stories labels",
        b"stories kd",
    )  # they log what the others do
    paths = [
        path
        for path in run_files(config.folder).values()
        if not any(name in path.read_bytes() for name in left_out)
    ]
    found = [OfflineRun(path) for path in paths]
    assert {run.start["job_type"] for run in found} == {"fm", "das", "vm"}
    for part in parts(config, source_schema(config)):
        had = logged(run for run in found if run.start["job_type"] in part.job_types)
        for panel in part.panels:
            asked = named(
                json.loads(panel._to_model().model_dump_json(by_alias=True, exclude_none=True))
            )
            assert asked and asked <= had, (part.name, asked - had)


def assert_timeline(config: Config) -> None:
    """Every pass of every role is there once, and the DAS waited for its teacher."""
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
    other bytes, or something stays local; or stores of one run are taken by another."""
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
        found = {
            "/".join(path.parts[len(remote.parts) :]): path.read_bytes()
            for path in remote.rglob("*")
            if not path.name.endswith(".sha256")
        }
        assert found and found.items() <= files.items(), part
        assert part == "snapshots" or found.keys() == files.keys(), (
            part
        )  # those that no window needs any more are gone
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
        match=r"s3://.*/base/config.yaml: a run with other settings has its stores there; choose another --name",
    ):
        PipelineRunner(other, EventStream.open(config.stores / "stream")).execute()


def test_two_workers_on_ray_equal_one(
    cluster: None,
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: two Ray Train workers take other rows than one."""
    config = config_of(tmp_path, "two", fm={"workers": 2}, vm={"workers": 2})
    run(config)
    rows = metrics(config)
    assert rows.keys() == metrics(base).keys()
    # the tolerance of tests/training/test_jobs.py: rounding of sums over two workers, carried
    # through 60 steps
    assert_close(list(rows.values()), [metrics(base)[key] for key in rows], 1e-3)


@pytest.mark.slow
def test_a_damaged_fragment_ends_the_run_and_it_goes_on_when_repaired(
    cluster: None,
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: an error in one role leaves the others waiting for ever, is not told as what it is, or
    spoils the run."""
    config = config_of(tmp_path, "damaged")
    stream = prepare_stream(config)
    path = stream.path(2, stream.window(2).fragments[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    started = time.monotonic()
    with pytest.raises(Exception, match=r".*") as caught:
        PipelineRunner(config, stream).execute()
    told = user_error(caught.value)
    assert told is not None and f"{path}: 100 bytes where the manifest says {len(whole)}" in str(
        told
    )
    assert time.monotonic() - started < 100, "the other roles did not end"
    error = config.folder / "logs" / "error.txt"
    assert f"{path}: 100 bytes" in error.read_text()
    path.write_bytes(whole)
    run(config)
    assert not error.exists()
    assert_same(config, base)


@pytest.mark.slow
def test_a_parked_window_is_told(
    cluster: None,
    base: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: a run that lacks a window's supervision ends with exit code 0, or before all that does
    not need it is done, or summary and report say nothing of it; or they do so for good."""
    config = config_of(tmp_path, "parked", das={"tries": 2, "ahead": 1})
    prepare_stream(config)
    file = tmp_path / "parked.yaml"
    full = config.folder / "supervision" / "fm" / "window=002"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    full.parent.mkdir(parents=True)
    full.touch()  # no folder can be made here
    assert main(["pipeline", "--config", str(file)]) == 2
    assert "no supervision of window(s) 2" in capsys.readouterr().err
    assert [
        Job("vm", config).checkpoints.latest().windows,
        Job("fm", config).checkpoints.latest().windows,
    ] == [2, WINDOWS]
    told = read_json(config.folder / "summary.json")["parked"]
    assert min(row["window"] for row in told) == 2 and {row["teacher"] for row in told} == {"fm"}
    assert "window 2, fragment=" in (config.folder / "report.html").read_text()
    full.unlink()
    assert main(["pipeline", "--config", str(file)]) == 0
    assert (
        read_json(config.folder / "summary.json")["parked"] == []
        and "class=lacks" not in (config.folder / "report.html").read_text()
    )
    assert_same(config, base)


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """`run.py pipeline` on the tiny stream in a process of its own."""
    file = folder / "config.yaml"
    file.write_text(
        yaml.safe_dump(merged(SETTINGS, {"run": {"dir": str(folder)}, "vm": {"arms": list(ARMS)}}))
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "run.py", "pipeline", "--config", str(file), "--name", name]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def kill_and_go_on(config: Config, moments: list[int | float]) -> None:
    """SIGKILL the driver at each moment (lines in metrics.jsonl, or seconds after the start), then
    let it end."""
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
def test_goes_on_after_a_kill(base: Config, tmp_path: Path) -> None:
    """Wrong: something half-written is read, or work is done twice or not at all, after the driver
    was killed (rule 5)."""
    config = config_of(tmp_path, "killed")
    kill_and_go_on(config, [20])
    assert_same(config, base)
    assert read_json(config.folder / "summary.json")["roles"]["fm"]["examples"] == WINDOWS * 900


@pytest.mark.slow
def test_goes_on_after_kills_at_any_moment(base: Config, tmp_path: Path) -> None:
    """Wrong: as above, at moments that nobody chose: in the start, in the stream's preparation, in
    a checkpoint."""
    config = config_of(tmp_path, "killed")
    kill_and_go_on(config, [1.0, 6.0, 14.0, 1, 20.0, 20, 40])
    assert_same(config, base)
