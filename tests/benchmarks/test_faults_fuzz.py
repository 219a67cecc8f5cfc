"""Malformed files and configs: refused in one line, or harmless."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_runs import run_locally
from small_runs import small_config
from workers import Workers

from benchmarks.faults_fuzz import BAD_CONFIGS, TARGETS, fuzz
from exfm_ray.config.load import dump_config
from exfm_ray.storage.atomic import write_text


@pytest.fixture(scope="module")
def run(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    config = small_config(tmp_path_factory.mktemp("fuzz"), "run")
    run_locally(groups, config)
    write_text(config.folder / "config.yaml", dump_config(config) + "\n---\n# python 3\n")
    return config.folder


def test_malformed_inputs_are_refused(run: Path, tmp_path: Path) -> None:
    """Wrong: a damaged file or a meaningless config is read as if it were good, or ends in a
    traceback."""
    found = fuzz(run, tmp_path, 5 * len(TARGETS))
    assert found["wrong"] == []
    assert (
        found["refused"] + found["harmless"]
        == found["inputs"]
        == 5 * len(TARGETS) + len(BAD_CONFIGS)
        > 100
    )
    assert found["refused"] > 80
