"""Which settings identify a run."""

from __future__ import annotations

from pathlib import Path

import yaml

from exfm_ray.config.root import Config
from exfm_ray.config.trainer import EXECUTION_SETTINGS

MUTABLE_ON_RESUME = {
    "fm": EXECUTION_SETTINGS,
    "vm": EXECUTION_SETTINGS,
    "checkpoint": True,
    "das": {"min_actors", "max_actors"},
}
"""Settings that may change when a run resumes: how it is spread, not what it learns."""


def identity_settings(config: Config) -> str:
    """Return the settings that must not change during a run, as YAML."""
    settings = config.model_dump(
        mode="json",
        exclude=MUTABLE_ON_RESUME,  # type: ignore[arg-type]
    )
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def store_identity_settings(config: Config) -> str:
    """Return the settings on which the contents of remote stores depend, as YAML.

    The run's folder is not among them: it may differ between machines.
    """
    run = config.run.model_copy(
        update={"dir": Path()},
    )
    without_folder = config.model_copy(
        update={"run": run},
    )
    return identity_settings(without_folder)
