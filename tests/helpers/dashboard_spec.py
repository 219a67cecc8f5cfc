"""The metrics and settings that a dashboard requests, read from what would be sent to wandb."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from wandb_files import OfflineRun

REQUEST_KEYS = ("metrics", "xAxis", "yAxis", "targetKey", "accessor")


def spec(view: Any) -> Any:
    """Return a workspace or report as the JSON that `save` sends."""
    return json.loads(view._to_model().model_dump_json(by_alias=True, exclude_none=True))


def panels(node: Any) -> list[Any]:
    """Return all panels at and below a node of a spec."""
    matches = []
    children: Iterable[Any] = ()
    if isinstance(node, dict):
        children = node.values()
        if "viewType" in node and "config" in node:
            matches.append(node)
    elif isinstance(node, list):
        children = node
    for child in children:
        matches += panels(child)
    return matches


def named(node: Any) -> set[str]:
    """Return what a panel requests: metrics, and settings prefixed with `config:` or `summary:`."""
    names: set[str] = set()
    if isinstance(node, list):
        for child in node:
            names |= named(child)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in REQUEST_KEYS and isinstance(value, str):
                names.add(value)
            elif key in REQUEST_KEYS and isinstance(value, list):
                names.update(value)
            else:
                names |= named(value)
    return names


def logged(runs: Iterable[OfflineRun]) -> set[str]:
    """Return everything that panels can request from these runs, in the notation of a spec."""
    names: set[str] = set()
    for run in runs:
        for point in run.history:
            names.update(point)
        names.update(run.summary)
        names.update(f"summary:{key}" for key in run.summary)
        names.update(f"config:{path}" for path in _paths(run.config))
    return names


def _paths(config: Any) -> set[str]:
    """Return the settings as wandb stores them: `value` is below each one of the first level."""
    paths = set()
    for first, section in config.items():
        paths |= {f"{first}.value{rest}" for rest in _relative(section)}
    return paths


def _relative(node: Any) -> set[str]:
    paths = {""}
    if isinstance(node, dict):
        for key, child in node.items():
            paths |= {f".{key}{rest}" for rest in _relative(child)}
    return paths
