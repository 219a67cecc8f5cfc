"""Dashboards as they would be sent to wandb, without a server.

Their panels show the figures that runs log, each section over its own runs.
"""

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
from exfm_ray.tracking.dashboard import report, save, sections, workspace

SWEEP = {"score_windows": [1, 2], "judge_windows": [3, 3], "arms": ["labels", "ah"]}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    surroundings(monkeypatch, tmp_path)


def config_of(folder: Path, **changes: Any) -> Config:
    return small_config(
        folder, "run", **{"tune": SWEEP, "vm": {"arms": ["labels", "ah"]}, **changes}
    )


def test_a_workspace_covers_pipeline_and_sweep(tmp_path: Path) -> None:
    """Wrong: an arm, the DAS, a task or the sweep is missing in the dashboard, or it shows the runs
    of other pipelines."""
    config = config_of(tmp_path)
    built = spec(workspace(config, source_schema(config), "us"))
    assert (built["entity"], built["project"], built["displayName"]) == ("us", "exfm-ray", "run")
    panels_of = {
        section["name"]: section["panels"]
        for section in built["spec"]["section"]["panelBankConfig"]["sections"]
    }
    assert list(panels_of) == [
        "Arms",
        "Transfer",
        "Foundation model",
        "DAS health",
        "Speed and memory",
        "Sweep",
    ]
    names = {
        name: set().union(*(named(panel) for panel in panels)) for name, panels in panels_of.items()
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


def test_a_foundation_model_alone(tmp_path: Path) -> None:
    """Wrong: a dashboard without students or sweep has empty sections, or a static set's passes
    fall on one point."""
    config = config_of(tmp_path, tune=None, vm={"models": []})
    assert [section.name for section in sections(config, source_schema(config))] == [
        "Foundation model",
        "Speed and memory",
    ]
    static = config_of(tmp_path, tune=None, vm={"models": []}, fm={"static": {}})
    assert {section.panels[0].x for section in sections(static, source_schema(static))} == {"pass"}


def test_a_report_shows_each_section_over_its_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: trials are shown among the arms, or a section is missing on the page."""
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
    assert [filters["jobType"] for filters in chosen] == [
        ["vm", "fm"],
        ["vm"],
        ["fm"],
        ["das"],
        ["fm", "vm"],
        ["tune"],
    ]
    assert [filters["group"] for filters in chosen] == [["run"]] * 5 + [["run/feed", "run/stories"]]
    assert all(grid["metadata"]["panelBankSectionConfig"]["panels"] for grid in grids)


def test_saving_needs_a_server(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: a user without a server waits, a job asks for a key, or the error is a traceback."""
    config = config_of(tmp_path, wandb={"mode": "offline"})
    with pytest.raises(
        UserError,
        match=(
            "setting 'wandb.mode' is offline: .*wandb sync .*/run/wandb/offline-run-.*"
            "--set wandb.mode=online"
        ),
    ):
        save(config, source_schema(config))
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main(["dashboard", "--config", "configs/demo.yaml", "--set", "wandb.mode=online"]) == 2
    assert (
        capsys.readouterr().err
        == "error: wandb has no API key: set WANDB_API_KEY, or run `wandb login`\n"
    )
