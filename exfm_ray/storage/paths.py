"""Where relative folders and the stores of a run lie.

Relative folders lie below EXFM_HOME, else below the working folder; in a Ray job never in its
uploaded code. The stores of a run (stream, snapshots, supervision) lie in its folder or on remote
storage.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from exfm_ray.base import Name
from exfm_ray.errors import UserError
from exfm_ray.storage.remote import AnyPath, RemotePath, check_url

UPLOADS = "working_dir_files"
"""Folder of a Ray node that holds uploaded code, one folder per upload.

Ray removes them when jobs or its session end.
"""


def uses_home_dir() -> bool:
    """Return True if relative folders do not start from the working folder."""
    if os.environ.get("EXFM_HOME"):
        return True
    return UPLOADS in Path.cwd().parts


def home_dir() -> Path:
    """Return the folder that relative paths start from.

    It is EXFM_HOME if that is set, `~/exfm-ray` in a job's uploaded code, else the working folder.
    It does not depend on which code was uploaded, so a run can be resumed with changed code.
    """
    if not uses_home_dir():
        return Path.cwd()
    home = os.environ.get("EXFM_HOME") or Path.home() / "exfm-ray"
    return Path(home).absolute()


def absolute(path: str | Path) -> Path:
    """Return `path` as an absolute path, below `home_dir()` if it is relative."""
    return home_dir() / path


def store_root(
    folder: Path,
    name: str,
    storage: str | None,
) -> AnyPath:
    """Return where the stores of a run lie: stream, snapshots, supervision, student data.

    Args:
        folder: the run's folder.
        name: the run's name.
        storage: the URL of `run.storage`, if it is set.
    """
    if storage is None:
        return folder
    return RemotePath(storage) / name


def store_root_of_run(run: Path) -> AnyPath:
    """Return where the stores of an existing run lie, according to the config in its folder.

    Raises:
        UserError: the config has a name or a storage URL that no config of ours can have.
    """
    try:
        settings = next(iter(yaml.safe_load_all((run / "config.yaml").read_text())))
        name = settings["name"]
        storage = settings["run"].get("storage")
    except (
        OSError,
        ValueError,
        yaml.YAMLError,
        StopIteration,
        TypeError,
        KeyError,
        AttributeError,
    ):
        return run  # the caller reads the settings next and reports what is wrong
    if storage is None:
        return run

    try:
        name = TypeAdapter(Name).validate_python(name)
        url = check_url(TypeAdapter(str).validate_python(storage))
        return store_root(run, name, url)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
    except ValueError as error:
        reason = str(error)
    raise UserError(
        f"{run / 'config.yaml'}: settings 'name' and 'run.storage' lead to no store ({reason}); "
        "run the run's command again"
    )
