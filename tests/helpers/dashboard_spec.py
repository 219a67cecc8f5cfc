"""What a dashboard asks of the runs, read from what wandb would be sent."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from wandb_files import OfflineRun

ASK = ("metrics", "xAxis", "yAxis", "targetKey", "accessor")


def spec(view: Any) -> Any:
    """A workspace or report as the JSON that `save` sends."""
    return json.loads(view._to_model().model_dump_json(by_alias=True, exclude_none=True))


def panels(node: Any) -> list[Any]:
    """All panels below a node of a spec."""
    found = [node] if isinstance(node, dict) and "viewType" in node and "config" in node else []
    below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return found + [panel for child in below for panel in panels(child)]


def named(node: Any) -> set[str]:
    """Metrics, and settings with `config:` or `summary:` before them, that a panel asks for."""
    found: set[str] = set()
    for key, value in node.items() if isinstance(node, dict) else ():
        if key in ASK and isinstance(value, str | list):
            found |= {value} if isinstance(value, str) else set(value)
        else:
            found |= named(value)
    for child in node if isinstance(node, list) else ():
        found |= named(child)
    return found


def logged(runs: Iterable[OfflineRun]) -> set[str]:
    """Everything that panels may ask of these runs, in a spec's words."""
    found: set[str] = set()
    for run in runs:
        found |= {key for point in run.history for key in point} | run.summary.keys()
        found |= {f"summary:{key}" for key in run.summary} | {
            f"config:{path}" for path in _paths(run.config)
        }
    return found


def _paths(config: Any) -> set[str]:
    """Settings as wandb keeps them: below each one of the first level stands `value`."""
    return {
        f"{first}.value{rest}" for first, section in config.items() for rest in _relative(section)
    }


def _relative(node: Any) -> set[str]:
    if not isinstance(node, dict):
        return {""}
    return {""} | {f".{key}{rest}" for key, child in node.items() for rest in _relative(child)}
