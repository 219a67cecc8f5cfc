"""`run.py das start|status|stop`: the service of a run in a running Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from rich.table import Table

from exfm_ray.cli.das_status import status_tables
from exfm_ray.config.root import Config
from exfm_ray.das.client import RPC_TIMEOUT_S, connect, end, services
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError


def start(
    config: Config,
    follow: bool,
    readers: Sequence[Path],
) -> str:
    """Start the run's service, or have the one that runs try again what is parked; what it does, in
    words. `readers`: see `LabelingSpec`."""
    order = LabelingSpec.from_config(config, readers)
    windows = EventStream.open(order.stream_root).windows()
    service = connect(order, detached=True, follow=follow)
    ray.get(service.follow.remote(follow), timeout=RPC_TIMEOUT_S)
    beyond = ", and those that appear later" if follow else ""
    return f"{order.name}: labels the {len(windows)} windows of {order.stream_root}{beyond}; see `run.py das status`, end it with `run.py das stop`"


def status(config: Config | None) -> Iterator[Table]:
    """The tables of all services, or of the run's. UserError where none runs."""
    for service in _chosen(config).values():
        yield from status_tables(ray.get(service.state.remote(), timeout=RPC_TIMEOUT_S))


def stop(config: Config | None) -> str:
    """End the run's service, or the only one. Nothing is lost: what is missing is scored when it is
    asked for again."""
    chosen = _chosen(config)
    if len(chosen) > 1:
        raise UserError(
            f"{len(chosen)} services run ({', '.join(chosen)}): name the run with --config"
        )
    ((name, service),) = chosen.items()
    end(service)
    return f"{name}: ended"


def _chosen(config: Config | None) -> dict[str, Any]:
    running = services()
    if config is None and not running:
        raise UserError("no DAS runs in this Ray; start one with `run.py das start --config FILE`")
    if config is None:
        return running
    name = LabelingSpec.from_config(config).name
    if name not in running:
        raise UserError(
            f"no DAS of run '{config.name}' runs in this Ray ({', '.join(running) or 'none does'}); start it with `run.py das start`"
        )
    return {name: running[name]}
