"""The files that are uploaded with a job: the code, and the config that the command names."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from exfm_ray.config.load import find_config
from exfm_ray.errors import UserError

CODE_ROOT = Path(__file__).parents[1]
"""The folder that holds the packages: the repository, or site-packages if a wheel is installed."""
PACKAGES = ("exfm_ray", "tuning")
"""The packages that a job imports; the ready configs lie in the first."""


@contextmanager
def staged(command: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary folder with everything to upload and nothing else.

    The same files make the same Ray package, which is uploaded once.

    Raises:
        UserError: the command names a relative config that is not a file below the working folder
            and not a ready config.
    """
    with TemporaryDirectory(prefix="exfm-ray-job-") as name:
        folder = Path(name)
        for package in PACKAGES:
            _copy_package(CODE_ROOT / package, folder / package)
        config = _named_config(command)
        if config is not None and not config.is_absolute():
            _copy_config(config, folder)
        yield folder


def _copy_package(source: Path, target: Path) -> None:
    """Copy a package without compiled code; links to folders become folders."""
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, target, ignore=compiled)


def _named_config(command: Sequence[str]) -> Path | None:
    """Return the value of --config, if the command has one."""
    following_words = [*command[1:], ""]
    for word, following in zip(command, following_words, strict=True):
        if word == "--config" and following:
            return Path(following)
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
    return None


def _copy_config(config: Path, folder: Path) -> None:
    """Copy a config of the user to the same relative path; a ready config is part of the code."""
    if ".." in config.parts:
        raise UserError(
            f"--config {config}: only a file below the working folder is uploaded with a job; "
            "an absolute path is a path on the cluster"
        )
    if config.is_file():
        target = folder / config
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(config, target)
    elif not find_config(config).is_file():
        raise UserError(
            f"{config}: no such config file here; it is uploaded with the job, "
            "while an absolute path is a path on the cluster"
        )
