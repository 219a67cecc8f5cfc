"""Real data sets for the converters' tests, and a short way to a config."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exfm_ray.config.root import Config

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / os.environ.get("EXFM_DATA", "../shared/data")

MakeConfig = Callable[..., Config]


@pytest.fixture
def data_set() -> Callable[[str], Path]:
    """The folder of a published data set; skips the test where it is missing."""

    def find(name: str) -> Path:
        if not (DATA / name).is_dir():
            pytest.skip(
                f"data set {name} is missing: EXFM_DATA names the folder that holds it (now {DATA})"
            )
        return DATA / name

    return find


@pytest.fixture
def make(tmp_path: Path) -> MakeConfig:
    """A config with a run folder of its own: make(source, root, name=..., **data settings)."""

    def build(
        source: str,
        root: Path | None = None,
        name: str = "run",
        seed: int = 0,
        **data: Any,
    ) -> Config:
        settings = {"source": source, "root": root or tmp_path, **data}
        return Config.model_validate(
            {"name": name, "seed": seed, "run": {"dir": tmp_path / "runs"}, "data": settings}
        )

    return build
