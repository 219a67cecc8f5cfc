"""The results of a run, read from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_runs import run_locally
from run_folders import CURVES, Examples, write_run
from small_runs import WINDOWS, small_config
from workers import Workers

from exfm_ray.errors import UserError
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.run_dir import initialize_run_dir
from exfm_ray.storage.atomic import read_json, read_jsonl
from exfm_ray.tracking.run_files import KEY, RunFiles, panels

FIGURES = [
    "ne",
    "calibration",
    "label_rate",
    "log_loss",
    "examples",
    "auc",
    "gauc",
    "best_ne",
    "ne_gain",
    "fm_ne_gain",
    "transfer_ratio",
]


def ne(examples: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """NE of all examples, from probabilities."""
    p_N = 1 / (
        1 + np.exp(-np.concatenate([logits for logits, _ in examples]).astype(np.longdouble))
    )
    y_N = np.concatenate([labels for _, labels in examples]).astype(np.longdouble)
    rate = y_N.mean()
    loss = -(y_N * np.log(p_N) + (1 - y_N) * np.log(1 - p_N)).mean()
    return float(loss / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))


def expected(examples: Examples) -> dict[tuple[str, ...], dict[str, float | None]]:
    """Key -> ne, gains and transfer_ratio after one window of warm-up, from the examples."""
    nes = {key: ne(by_window[1:]) for key, by_window in examples.items()}
    figures: dict[tuple[str, ...], dict[str, float | None]] = {}
    for key, value in nes.items():
        role, model, arm, domain, task = key
        figures[key] = {"ne": value}
        if role == "vm":
            labels = nes[role, model, "labels", domain, task]
            gain = 1 - value / labels
            fm_gain = (
                1 - nes["fm", "fm", "fm", domain, task] / labels
                if ("fm", "fm", "fm", domain, task) in nes
                else None
            )
            ratio = None if arm == "labels" or fm_gain is None or fm_gain <= 0 else gain / fm_gain
            figures[key] |= {"ne_gain": gain, "fm_ne_gain": fm_gain, "transfer_ratio": ratio}
    return figures


@pytest.mark.parametrize("roles", [("fm", "vm"), ("fm",), ("vm",)])
def test_figures_are_those_of_all_examples(tmp_path: Path, roles: tuple[str, ...]) -> None:
    """Wrong: NEs of windows are averaged, the warm-up counts, gains are over another baseline, or
    an unfinished run has no figures."""
    config, examples = write_run(tmp_path, "r", roles=roles)
    rows = {tuple(row[key] for key in KEY): row for row in RunFiles.open(config.folder).figures}
    assert rows.keys() == expected(examples).keys() == {key for key in CURVES if key[0] in roles}
    for key, figures in expected(examples).items():
        for figure, value in figures.items():
            assert rows[key][figure] == (
                None if value is None else pytest.approx(value, rel=1e-9)
            ), (key, figure)


def test_a_whole_run(groups: dict[int, Workers], tmp_path: Path) -> None:
    """Wrong: the figures differ from those of summary.json, or a pass of a job is missing in the
    timeline."""
    config = small_config(tmp_path, "whole")
    prepare_stream(config)
    initialize_run_dir(config)
    summary = run_locally(groups, config)
    run = RunFiles.open(config.folder)
    summarized = {tuple(row[key] for key in KEY): row for row in summary["figures"]}
    assert len(summarized) == len(run.figures) > 0
    for row in run.figures:
        other = summarized[tuple(row[key] for key in KEY)]
        for figure in FIGURES:
            assert row.get(figure) == (
                None if other.get(figure) is None else pytest.approx(other[figure], rel=1e-9)
            ), (row, figure)
    assert run.state == "done" and run.done == {"fm": WINDOWS, "feed": WINDOWS, "stories": WINDOWS}
    spans = read_jsonl(config.folder / "timeline.jsonl")
    assert [(s["role"], s["window"], s["phase"]) for s in spans] == [
        (role, window, phase)
        for role in ("fm", "vm")
        for window in range(WINDOWS)
        for phase in ("evaluate", "learn")
    ]
    assert [s["examples"] for s in spans if s["role"] == "fm"] == [0, 900] * WINDOWS
    for role in ("fm", "vm"):
        role_spans = [s for s in spans if s["role"] == role]
        times = [at for s in role_spans for at in (s["started_s"], s["ended_s"])]
        assert times == pytest.approx(
            sorted(times), abs=0.01
        )  # two clocks: one for the time, one for durations
        assert all(0 <= s["waited_s"] <= s["ended_s"] - s["started_s"] for s in role_spans)
        assert sum(s["ended_s"] - s["started_s"] for s in role_spans) == pytest.approx(
            summary["roles"][role]["seconds"], rel=1e-3
        )


def test_states(tmp_path: Path) -> None:
    """Wrong: a run that was killed or has failed is listed as done."""
    states: dict[str, Any] = {
        "whole": {},
        "killed": {"windows": 2},
        "no VMs yet": {"roles": ("fm",)},
        "begun": {"windows": 0},
    }
    runs = {
        name: RunFiles.open(write_run(tmp_path / name.replace(" ", ""), "r", **arguments)[0].folder)
        for name, arguments in states.items()
    }
    assert {name: run.state for name, run in runs.items()} == {
        "whole": "done",
        "killed": "unfinished",
        "no VMs yet": "unfinished",
        "begun": "unfinished",
    }
    assert runs["no VMs yet"].done == {"fm": 4, "feed": 0, "stories": 0}
    (runs["killed"].folder / "logs").mkdir()
    (runs["killed"].folder / "logs" / "error.txt").write_text("ValueError")
    assert runs["killed"].state == "failed"


def test_a_summary_of_fewer_windows_is_not_mixed_in(tmp_path: Path) -> None:
    """Wrong: a run that was resumed and killed shows the AUC of its first windows beside the NE of
    all."""
    config, _ = write_run(tmp_path, "r")
    figures = [row | {"auc": 0.75, "best_ne": 0.5} for row in RunFiles.open(config.folder).figures]
    figures[0]["examples"] -= 1
    (config.folder / "summary.json").write_text(json.dumps({"figures": figures}))
    assert read_json(config.folder / "summary.json")["figures"][0]["auc"] == 0.75
    shown = RunFiles.open(config.folder).figures
    assert "auc" not in shown[0] and all(
        row["auc"] == 0.75 and row["best_ne"] == 0.5 for row in shown[1:]
    )


def test_panels_hold_the_fm_on_the_same_examples(tmp_path: Path) -> None:
    """Wrong: a vertical model is drawn with the FM on another domain or task, or a curve is
    missing."""
    drawn = panels(RunFiles.open(write_run(tmp_path, "r")[0].folder))
    assert [panel.title for panel in drawn] == [
        "FM: click, all domains",
        "FM: conversion, all domains",
        "feed: click, feed",
        "stories: conversion, stories",
    ]
    assert [list(panel.curves) for panel in drawn] == [
        ["fm"],
        ["fm"],
        ["fm", "labels", "kd", "ah", "ah_sa"],
        ["fm", "labels", "kd", "ah", "ah_sa"],
    ]
    for panel in drawn:
        for arm, rows in panel.curves.items():
            assert [row["window"] for row in rows] == [0, 1, 2, 3]
            assert {(row["arm"], row["domain"], row["task"]) for row in rows} == {
                (arm, panel.domain, panel.task)
            }


def test_no_run(tmp_path: Path) -> None:
    """Wrong: a wrong folder ends in a traceback, or an empty page is written there."""
    with pytest.raises(UserError, match="nothing: no such folder"):
        RunFiles.open(tmp_path / "nothing")
    with pytest.raises(UserError, match="no run here: it has no config.yaml"):
        RunFiles.open(tmp_path)
    write_run(tmp_path / "runs", "r")
    with pytest.raises(UserError, match="did you mean .*runs/r"):
        RunFiles.open(tmp_path / "r")
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        RunFiles.open(tmp_path)
    (tmp_path / "config.yaml").write_text("a")
    with pytest.raises(UserError, match="not the settings of a run"):
        RunFiles.open(tmp_path)
