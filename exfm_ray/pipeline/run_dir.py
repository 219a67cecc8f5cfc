"""The folder of a run: its resolved settings and its log.

A run's folder and its remote stores hold one run. The first command writes the resolved settings
there; a later command with other settings is refused.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """Write the resolved settings and the versions of the main packages.

    Raises:
        UserError: the folder or the stores hold a run with other settings.
    """
    path = config.folder / "config.yaml"
    settings = dump_config(config)
    if path.exists() and _stored_settings(path, identity_settings) != identity_settings(config):
        raise UserError(
            f"{path}: this folder holds a run with other settings; choose another --name, "
            "or remove the folder"
        )
    _claim_stores(config, settings)
    versions = "".join(f"# {name} {version(name)}\n" for name in PACKAGES)
    write_text(path, f"{settings}\n---\n# python {platform.python_version()}\n{versions}")


@contextmanager
def run_log(folder: Path) -> Iterator[None]:
    """Show warnings of this package on stderr and append them to <run>/logs/driver.log."""
    path = folder / "logs" / "driver.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    terminal = logging.StreamHandler()
    terminal.setFormatter(logging.Formatter("warning: %(message)s"))
    terminal.setLevel(logging.WARNING)

    logger = logging.getLogger("exfm_ray")
    handlers = (terminal, file)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _claim_stores(config: Config, settings: str) -> None:
    """Write the settings to remote stores, too: runs of other folders may name the same stores."""
    path = config.stores / "config.yaml"
    if isinstance(path, Path):
        return
    if path.exists():
        stored = _stored_settings(path, store_identity_settings)
        if stored != store_identity_settings(config):
            raise UserError(
                f"{path}: a run with other settings has its stores there; choose another --name "
                "or run.storage"
            )
    write_text(path, settings)


def _stored_settings(path: AnyPath, identity: Callable[[Config], str]) -> str | None:
    """The identity of the settings in a file; None if this version cannot read them."""
    try:
        settings = yaml.safe_load(path.read_text().split("\n---\n")[0])
        return identity(Config.model_validate(settings))
    except (ValueError, yaml.YAMLError):
        return None
