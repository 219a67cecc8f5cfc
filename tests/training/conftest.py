"""One undisturbed run for the tests that compare others with it."""

from __future__ import annotations

import pytest
from local_runs import run_locally
from small_runs import small_config
from workers import Workers

from exfm_ray.config.root import Config


@pytest.fixture(scope="session")
def base(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An undisturbed run on one worker. No test writes into its folder."""
    config = small_config(tmp_path_factory.mktemp("undisturbed"), "base")
    run_locally(groups, config)
    return config
