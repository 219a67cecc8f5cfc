"""A run folder written before settings, modules and manifests were renamed.

`tests/former_run/` holds the folder of a run whose FM has learned and whose windows are scored, the
settings it was begun with, under their former names, and the figures of the whole run as the former
code computed them.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from local_runs import run_locally
from small_runs import merged
from workers import Workers

from exfm_ray.config.root import Config
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.run_dir import initialize_run_dir
from exfm_ray.tracking.report import write_report
from exfm_ray.tracking.run_files import RunFiles

FORMER = Path(__file__).parents[1] / "former_run"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The config of the run, whose folder is unpacked below `tmp_path`."""
    with tarfile.open(FORMER / "run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    stored = tmp_path / "former" / "config.yaml"
    stored.write_text(stored.read_text().replace("RUN_DIR", str(tmp_path)))
    settings = yaml.safe_load((FORMER / "former_settings.yaml").read_text())
    here = {"name": "former", "run": {"dir": tmp_path}, "data": {"root": tmp_path}}
    return Config.model_validate(merged(settings, here))


def by_identity(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of metrics.jsonl without their speed, as text in one order."""
    for row in rows:
        row.pop("examples_per_s", None)
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def test_a_former_run_is_resumed_with_the_same_figures(
    config: Config,
    groups: dict[int, Workers],
) -> None:
    """Wrong: a rename makes a run of the former version another run, repeats what it has done, or
    changes a figure."""
    initialize_run_dir(config)
    assert prepare_stream(config).windows() == [0, 1, 2, 3]
    metrics = config.folder / "metrics.jsonl"
    before = metrics.read_text()
    run_locally(groups, config)
    assert metrics.read_text().startswith(before), "what was done is done again"
    expected = (FORMER / "whole_metrics.jsonl").read_text().splitlines()
    found = metrics.read_text().splitlines()
    assert by_identity([json.loads(line) for line in found]) == by_identity(
        [json.loads(line) for line in expected]
    )


def test_a_former_run_is_read(config: Config) -> None:
    """Wrong: reports and comparisons of runs made by the former version end in an error."""
    run = RunFiles.open(config.folder)
    assert {row["model"] for row in run.rows} == {"fm"}
    assert write_report(config.folder).stat().st_size > 0
