"""Which settings make a run what it is."""

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
"""Settings with which a run that has begun may go on otherwise: how it is spread, not what it
learns."""


def identity_settings(config: Config) -> str:
    """The settings that a run keeps from its beginning to its end, as YAML."""
    kept = config.model_dump(mode="json", exclude=MUTABLE_ON_RESUME)  # type: ignore[arg-type]
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def store_identity_settings(config: Config) -> str:
    """Those of them on which what lies in remote stores depends: not the folder, which may be
    another on each machine."""
    return identity_settings(
        config.model_copy(update={"run": config.run.model_copy(update={"dir": Path()})})
    )
