"""A run's folder and its remote stores hold one run: the first command writes its resolved config
there, one of other settings is refused."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import yaml

from exfm_ray.config.identity import identity_settings, store_identity_settings
from exfm_ray.config.load import dump_config
from exfm_ray.config.root import Config
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import write_text
from exfm_ray.storage.remote import AnyPath

PACKAGES = ("torch", "ray", "deepspeed", "torchrec", "pyarrow", "numpy")


def initialize_run_dir(config: Config) -> None:
    """Write the resolved config and the versions of what it runs with; UserError where the folder
    holds a run of other settings."""
    path = config.folder / "config.yaml"
    settings = dump_config(config)
    if path.exists() and _stored_settings(path, identity_settings) != identity_settings(config):
        raise UserError(
            f"{path}: this folder holds a run with other settings; choose another --name, or remove the folder"
        )
    _claim_stores(config, settings)
    versions = "".join(f"# {name} {version(name)}\n" for name in PACKAGES)
    write_text(path, f"{settings}\n---\n# python {platform.python_version()}\n{versions}")


def _claim_stores(config: Config, settings: str) -> None:
    """The same for remote stores, which runs from other folders may name, too."""
    path = config.stores / "config.yaml"
    if isinstance(path, Path):
        return
    if path.exists() and _stored_settings(path, store_identity_settings) != store_identity_settings(
        config
    ):
        raise UserError(
            f"{path}: a run with other settings has its stores there; choose another --name or run.storage"
        )
    write_text(path, settings)


def _stored_settings(path: AnyPath, kept: Callable[[Config], str]) -> str | None:
    """The settings with which the run in this folder was begun; None where they are none of this
    version's."""
    try:
        return kept(Config.model_validate(yaml.safe_load(path.read_text().split("\n---\n")[0])))
    except (ValueError, yaml.YAMLError):
        return None
