"""Read a config from a YAML file and dotted overrides, and write it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from exfm_ray.config.explain import explain
from exfm_ray.config.root import Config
from exfm_ray.config.tree import set_dotted
from exfm_ray.errors import UserError

READY_CONFIGS = Path(__file__).parents[1] / "configs"
"""The folder of the configs that ship with the package."""


def find_config(file: Path) -> Path:
    """Return the path of a config file: `file` itself, or a ready config of that name.

    If `file` does not exist, `demo`, `demo.yaml` and `configs/demo.yaml` all name the ready config
    `demo`. A path that is neither is returned unchanged.
    """
    if file.is_file() or file.is_absolute() or ".." in file.parts:
        return file

    parts = list(file.parts)
    if parts and parts[0] == READY_CONFIGS.name:
        parts.pop(0)
    ready = READY_CONFIGS.joinpath(*parts)
    if not ready.suffix:
        ready = ready.with_suffix(".yaml")
    if ready.is_file():
        return ready
    return file


def load_config(
    file: Path,
    overrides: Sequence[str] = (),
    name: str | None = None,
) -> Config:
    """Read and validate a config.

    Args:
        file: a YAML file, or the name of a ready config such as `demo`.
        overrides: settings as `section.key=value`, with values in YAML.
        name: name of the run; by default the file's own `name`, else the file's stem.

    Raises:
        UserError: the file cannot be read, or a setting is wrong; it names the setting.
    """
    tree = _read_yaml(file)
    tree.setdefault("name", file.stem)
    for override in overrides:
        _apply(tree, override)
    if name:
        tree["name"] = name

    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        mistakes = "; ".join(explain(mistake, Config) for mistake in error.errors())
        raise UserError(f"{file}: {mistakes}") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(find_config(file).read_text())
    except FileNotFoundError:
        raise UserError(
            f"{file}: no such config file, and no ready config of this name "
            f"({', '.join(_ready_names())})"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a config: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None

    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(
            f"{file}: a config is a mapping of sections, this is a {type(tree).__name__}"
        )
    return tree


def _ready_names() -> list[str]:
    files = READY_CONFIGS.glob("*.yaml")
    return sorted(file.stem for file in files)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write it as section.key=value")
    try:
        set_dotted(tree, key, yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: '{value}' is not a YAML value ({error})") from None
    except ValueError as error:
        raise UserError(f"--set {override}: {error}") from None


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML."""
    tree = config.model_dump(mode="json")
    return yaml.safe_dump(
        tree,
        sort_keys=False,
        allow_unicode=True,
    )
