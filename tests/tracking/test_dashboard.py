"""Dashboards as wandb would be sent them: panels of the figures that runs log, each over its own
runs; no server is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dashboard_spec import named, spec
from small_runs import small_config
from wandb_files import surroundings

from exfm_ray.cli.main import main
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import source_schema
from exfm_ray.errors import UserError
from exfm_ray.tracking.dashboard import parts, report, save, workspace

SWEEP = {"score_windows": [1, 2], "judge_windows": [3, 3], "arms": ["labels", "ah"]}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    surroundings(monkeypatch, tmp_path)


def config_of(folder: Path, **changes: Any) -> Config:
    return small_config(
        folder, "run", **{"tune": SWEEP, "vm": {"arms": ["labels", "ah"]}, **changes}
    )


def test_a_workspace_has_every_view_over_the_runs_of_pipeline_and_sweep(tmp_path: Path) -> None:
    """Wrong: an arm, the DAS, a task or the sweep is not in the dashboard, or other pipelines' runs
    are."""
    config = config_of(tmp_path)
    built = spec(workspace(config, source_schema(config), "us"))
    assert (built["entity"], built["project"], built["displayName"]) == ("us", "exfm-ray", "run")
    sections = {
        section["name"]: section["panels"]
        for section in built["spec"]["section"]["panelBankConfig"]["sections"]
    }
    assert list(sections) == [
        "Arms",
        "Transfer",
        "Foundation model",
        "DAS health",
        "Speed and memory",
        "Sweep",
    ]
    names = {
        name: set().union(*(named(panel) for panel in panels)) for name, panels in sections.items()
    }
    assert {"ne/click/feed", "ne/conversion/stories", "calibration/click/feed"} < names["Arms"]
    assert "all_windows/transfer_ratio/conversion/stories" in names["Transfer"]
    assert {"ne/click/all", "ne/conversion/all"} < names["Foundation model"]
    assert {"freshness_lag", "waited_s", "examples_per_s"} < names[
        "DAS health"
    ] and "peak_memory_bytes" in names["Speed and memory"]
    assert {
        "summary:score",
        "config:distillation.value.ah.w",
        "config:vm.value.optimizer.table_lr",
    } < names["Sweep"]
    assert not any(
        "kd" in name or ".sa." in name for name in names["Sweep"]
    )  # no arm of this sweep searches them
    (shown,) = built["spec"]["section"]["runSets"][0]["filters"]["filters"]
    assert shown["key"] == {"section": "run", "name": "group"} and shown["value"] == [
        "run",
        "run/feed",
        "run/stories",
    ]


def test_a_foundation_model_alone_has_its_own_views(tmp_path: Path) -> None:
    """Wrong: a dashboard without students or sweep has empty sections, or a static set's passes
    fall on one point."""
    config = config_of(tmp_path, tune=None, vm={"models": []})
    assert [part.name for part in parts(config, source_schema(config))] == [
        "Foundation model",
        "Speed and memory",
    ]
    static = config_of(tmp_path, tune=None, vm={"models": []}, fm={"static": {}})
    assert {part.panels[0].x for part in parts(static, source_schema(static))} == {"pass"}


def test_a_report_shows_each_part_over_its_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: trials stand among the arms, or a part is missing in the page."""
    config = config_of(tmp_path)
    answer = {"project": {"internalId": "abc"}}
    monkeypatch.setattr("wandb_workspaces.reports.v2.interface._get_api", lambda: None)
    monkeypatch.setattr(
        "wandb_workspaces.reports.v2.interface.execute_graphql", lambda *arguments: answer
    )
    grids = [
        block
        for block in spec(report(config, source_schema(config), "us"))["spec"]["blocks"]
        if block["type"] == "panel-grid"
    ]
    chosen = [
        {f["key"]["name"]: f["value"] for f in grid["metadata"]["runSets"][0]["filters"]["filters"]}
        for grid in grids
    ]
    assert [one["jobType"] for one in chosen] == [
        ["vm", "fm"],
        ["vm"],
        ["fm"],
        ["das"],
        ["fm", "vm"],
        ["tune"],
    ]
    assert [one["group"] for one in chosen] == [["run"]] * 5 + [["run/feed", "run/stories"]]
    assert all(grid["metadata"]["panelBankSectionConfig"]["panels"] for grid in grids)


def test_saving_needs_a_server(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: a user without a server waits, is asked for a key by a job, or reads a traceback."""
    config = config_of(tmp_path, wandb={"mode": "offline"})
    with pytest.raises(
        UserError,
        match="setting 'wandb.mode' is offline: .*wandb sync .*/run/wandb/offline-run-.*--set wandb.mode=online",
    ):
        save(config, source_schema(config))
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main(["dashboard", "--config", "configs/demo.yaml", "--set", "wandb.mode=online"]) == 2
    assert (
        capsys.readouterr().err
        == "error: wandb has no API key: set WANDB_API_KEY, or run `wandb login`\n"
    )
