"""What goes up with a job: the code, the configs, and the config that the command names."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from exfm_ray.errors import UserError

REPOSITORY = Path(__file__).parents[1]
CODE = ("exfm_ray", "tuning", "configs", "run.py", "pyproject.toml")


@contextmanager
def staged(command: Sequence[str]) -> Iterator[Path]:
    """A temporary folder with all that goes up and nothing else. The same files make the same
    package, which Ray uploads once."""
    with TemporaryDirectory(prefix="exfm-ray-job-") as name:
        folder = Path(name)
        for part in CODE:
            _copy(REPOSITORY / part, folder / part)
        config = _named_config(command)
        if config is not None and not config.is_absolute():
            _copy(_checked(config), folder / config)
        yield folder


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def _named_config(command: Sequence[str]) -> Path | None:
    """The value of --config, if the command has one."""
    for word, after in zip(command, [*command[1:], ""], strict=True):
        if word == "--config" and after:
            return Path(after)
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
    return None


def _checked(config: Path) -> Path:
    if ".." in config.parts:
        raise UserError(
            f"--config {config}: only a file below the working folder goes up with a job; an absolute path is one of the cluster's"
        )
    if not config.is_file() and not (REPOSITORY / config).is_file():
        raise UserError(
            f"{config}: no such config file here; it goes up with the job, while an absolute path is one of the cluster's"
        )
    return config
