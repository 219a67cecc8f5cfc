"""A pipeline in wandb: one complete run for each model and arm and for the DAS, on its axis."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_config
from wandb_files import KEY, OfflineRun, content, run_files, surroundings

from exfm_ray.config.root import Config
from exfm_ray.storage.atomic import write_json
from exfm_ray.tracking import wandb_pipeline
from exfm_ray.tracking.wandb_pipeline import PipelineRuns

pytestmark = pytest.mark.heavy

SUMMARY = {
    "figures": [
        {
            "role": "vm",
            "model": "feed",
            "arm": "ah",
            "domain": "feed",
            "task": "click",
            "ne": 0.9,
            "ne_gain": 0.02,
            "transfer_ratio": 0.5,
        }
    ],
    "peak_memory_bytes": 5000,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    surroundings(monkeypatch, tmp_path)


def row(
    role: str,
    model: str,
    arm: str,
    domain: str,
    window: int,
    examples: int,
    ne: float | None,
    **other: Any,
) -> dict[str, Any]:
    figures = {
        "ne": ne,
        "auc": None,
        "gauc": None,
        "log_loss": 0.5,
        "calibration": 1.01,
        "label_rate": 0.25,
        "examples": examples,
    }
    identity = {
        "window": window,
        "role": role,
        "model": model,
        "arm": arm,
        "domain": domain,
        "task": "click",
        "seed": 0,
        "snapshot": None,
    }
    return {**identity, **figures, "examples_per_s": 1000.0, **other}


def add(
    config: Config,
    rows: list[dict[str, Any]],
    scored: list[dict[str, Any]],
) -> None:
    for path, lines in (
        (config.folder / "metrics.jsonl", rows),
        (config.folder / "timeline.jsonl", scored),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def span(role: str, window: int) -> dict[str, Any]:
    """A span of two seconds, of which 1.5 were spent waiting."""
    return {
        "role": role,
        "window": window,
        "phase": "score",
        "started_s": 10.0,
        "ended_s": 12.0,
        "waited_s": 1.5,
        "examples": 70,
        "snapshot": 1,
    }


def window(number: int) -> list[dict[str, Any]]:
    """The rows of a window: the FM on two domains and on all, and one student."""
    fm = [
        row("fm", "fm", "fm", domain, number, n, 0.9 + number / 100)
        for domain, n in (("all", 70), ("feed", 40), ("search", 30))
    ]
    return [*fm, row("vm", "feed", "ah", "feed", number, 40, None if number == 0 else 0.95)]


def stored(folder: Path, digest: str) -> Path:
    """A stored model."""
    write_json(
        folder / "model.json",
        {
            "facts": {"windows": 3},
            "tasks": ["click"],
            "files": {"dense.safetensors": digest},
            "network": {},
        },
    )
    (folder / "dense.safetensors").write_bytes(b"x")
    return folder


def written(config: Config) -> dict[str, OfflineRun]:
    runs = [OfflineRun(path) for path in run_files(config.folder).values()]
    return {run.start["display_name"]: run for run in runs}


def follow(config: Config) -> None:
    PipelineRuns(config, lambda: SUMMARY).close()


def test_each_model_is_a_run(tmp_path: Path) -> None:
    """Wrong: the models of a pipeline cannot be compared in wandb by the examples that they had
    seen, or a figure is of another domain."""
    config = small_config(tmp_path, "run", wandb={"mode": "offline"})
    add(config, [*window(0), *window(1), *window(2)], [span("fm", 2), span("das", 2)])
    student = stored(config.folder / "exported" / "feed-ah", "a" * 64)
    for version in (2, 999, 1000):
        stored(config.folder / "snapshots" / "fm" / f"version={version:03d}", "b" * 64)
    (config.folder / "snapshots" / "fm" / "version=1001").mkdir()  # not published yet
    follow(config)
    runs = written(config)
    assert {
        name: (run.start["run_group"], run.start["job_type"]) for name, run in runs.items()
    } == {
        "fm": ("run", "fm"),
        "feed ah": ("run", "vm"),
        "das": ("run", "das"),
    }
    fm = runs["fm"]
    vm = runs["feed ah"]
    das = runs["das"]
    assert fm.metrics == {"examples": None, "*": "examples"}
    assert [(point["examples"], point["window"]) for point in fm.history] == [
        (0, 0),
        (70, 1),
        (140, 2),
    ]
    assert [point["examples"] for point in vm.history] == [0, 40, 80]
    assert (
        fm.history[2]["ne/click/search"] == pytest.approx(0.92)
        and fm.history[2]["calibration/click/all"] == 1.01
    )
    assert "ne/click/feed" not in vm.history[0] and vm.history[1]["ne/click/feed"] == 0.95
    assert das.history == [
        {
            "examples": 70,
            "window": 2,
            "snapshot": 1,
            "freshness_lag": 2,
            "examples_per_s": 140.0,
            "waited_s": 1.5,
        }
    ]
    assert (
        vm.summary["all_windows/transfer_ratio/click/feed"] == 0.5
        and vm.summary["peak_memory_bytes"] == 5000
    )
    assert fm.config["fm"]["batch_size"] == config.fm.batch_size and vm.config["arm"] == "ah"
    (export,), (snapshot,) = vm.artifacts, fm.artifacts
    assert (export["type"], export["name"], snapshot["type"], snapshot["name"]) == (
        "export",
        "run-feed-ah",
        "snapshot",
        "run-fm",
    )
    assert export["metadata"] == {
        "facts": {"windows": 3},
        "tasks": ["click"],
        "sha256": {"dense.safetensors": "a" * 64},
    }
    assert export["references"] == {
        name: (student / name).as_uri() for name in ("model.json", "dense.safetensors")
    }
    assert (
        snapshot["references"]["model.json"]
        == (config.folder / "snapshots" / "fm" / "version=1000" / "model.json").as_uri()
    )
    assert not das.artifacts
    assert KEY.encode() not in content(config.folder)


def test_runs_are_written_once(tmp_path: Path) -> None:
    """Wrong: a resumed run leaves two halves, or a command that has nothing to do writes everything
    again."""
    config = small_config(tmp_path, "run", wandb={"mode": "offline"})
    add(config, window(0), [])
    follow(config)
    before = run_files(config.folder)
    follow(config)
    assert run_files(config.folder) == before
    add(config, window(1), [])
    follow(config)
    assert run_files(config.folder).keys() == before.keys()
    assert [len(run.history) for run in written(config).values()] == [2, 2]


def test_figures_arrive_during_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a dashboard is empty until the last window is learned."""
    monkeypatch.setattr(wandb_pipeline, "POLL_S", 0.05)
    config = small_config(tmp_path, "run", wandb={"mode": "offline"})
    runs = PipelineRuns(config, lambda: SUMMARY)
    add(config, window(0), [])
    for _ in range(400):
        if len(runs._seen) == 2:
            break
        runs._over.wait(0.05)
    assert {str(key): seen for key, seen in runs._seen.items()} == {"fm": 70, "feed ah": 40}
    add(config, window(1), [])
    runs.close()
    assert [len(run.history) for run in written(config).values()] == [2, 2]


def test_a_wandb_that_hangs_does_not_block_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: a finished run never ends because its last figures cannot be written."""
    monkeypatch.setattr(wandb_pipeline, "CLOSE_S", 0.2)
    hangs = threading.Event()
    monkeypatch.setattr(PipelineRuns, "_follow", lambda self: hangs.wait(60))
    try:
        PipelineRuns(
            small_config(tmp_path, "run", wandb={"mode": "offline"}), lambda: SUMMARY
        ).close()
    finally:
        hangs.set()
    assert (
        "wandb: the run waited 0 s for its last figures to be written and gave up. Rerun the same"
        in capsys.readouterr().err
    )


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    """Wrong: a run with wandb disabled writes wandb's files."""
    config = small_config(tmp_path, "run", wandb={"mode": "disabled"})
    add(config, window(0), [])
    follow(config)
    assert not (config.folder / "wandb").exists()


def test_an_error_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong: training ends, or hangs, because a dashboard cannot be written."""
    config = small_config(tmp_path, "run", wandb={"mode": "offline"})
    add(config, window(0), [])
    (config.folder / "wandb").write_text("a file where the folder should be")
    follow(config)
    assert capsys.readouterr().err.startswith("wandb: ")
