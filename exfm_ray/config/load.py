"""A config from a YAML file and dotted overrides, and back."""

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


def load_config(
    file: Path,
    overrides: Sequence[str] = (),
    name: str | None = None,
) -> Config:
    """Read a YAML config, apply `section.key=value` overrides (values are YAML), validate.

    The run's name is `name`, else the file's own `name`, else the file's stem. UserError names the
    setting at fault.
    """
    try:
        tree = yaml.safe_load(file.read_text())
        tree = {} if tree is None else tree
    except FileNotFoundError:
        raise UserError(f"{file}: no such config file; configs/ holds ready ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a config: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{file}: a config is a mapping of sections, this is a {type(tree).__name__}"
        )
    tree.setdefault("name", file.stem)
    for override in overrides:
        _apply(tree, override)
    if name:
        tree["name"] = name
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(
            f"{file}: " + "; ".join(explain(e, Config) for e in error.errors())
        ) from None


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
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
