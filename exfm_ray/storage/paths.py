"""Where relative folders lie: below EXFM_HOME, else below the working folder; in a Ray job never in
the code uploaded for it. And where a run keeps what its roles give each other: in its folder, or
remote."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from exfm_ray.base import Name
from exfm_ray.errors import UserError
from exfm_ray.storage.remote import AnyPath, RemotePath, check_url

UPLOADS = "working_dir_files"
"""The folder of a Ray node in which uploaded code lies, one folder for each upload. Ray removes
them when jobs or its session end."""


def uses_home_dir() -> bool:
    """Whether relative folders lie elsewhere than below the working folder."""
    return bool(os.environ.get("EXFM_HOME")) or UPLOADS in Path.cwd().parts


def home_dir() -> Path:
    """The folder that relative paths start from: EXFM_HOME, where it is not set ~/exfm-ray in a
    job's uploaded code, else the working folder. It does not depend on the code uploaded, so that a
    run goes on where it stopped."""
    if uses_home_dir():
        return Path(os.environ.get("EXFM_HOME") or Path.home() / "exfm-ray").absolute()
    return Path.cwd()


def absolute(path: str | Path) -> Path:
    """`path` made absolute."""
    return home_dir() / path


def store_root(
    folder: Path,
    name: str,
    storage: str | None,
) -> AnyPath:
    """Where the run `name` in `folder` has its stores: stream, snapshots, supervision, and what
    students are given beside it."""
    return folder if storage is None else RemotePath(storage) / name


def store_root_of_run(run: Path) -> AnyPath:
    """The same of a run that is there, as the config in its folder says. UserError where that says
    what no config of ours could."""
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
    ):  # whoever reads the settings says so
        return run
    if storage is None:
        return run
    try:
        return store_root(
            run,
            TypeAdapter(Name).validate_python(name),
            check_url(TypeAdapter(str).validate_python(storage)),
        )
    except ValidationError as error:
        told = error.errors()[0]["msg"]
    except ValueError as error:
        told = str(error)
    raise UserError(
        f"{run / 'config.yaml'}: settings 'name' and 'run.storage' lead to no store ({told}); give the run's command again"
    )
