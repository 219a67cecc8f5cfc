"""The DAS of a run as a service in a running Ray: start it, show its state, end it."""

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
    """Start the run's service, or make the running one retry what has failed.

    Args:
        config: the run.
        follow: also label windows that appear later.
        readers: see `LabelingSpec`.

    Returns:
        What the service does, as a sentence.
    """
    spec = LabelingSpec.from_config(config, readers)
    windows = EventStream.open(spec.stream_root).windows()
    service = connect(spec, detached=True, follow=follow)
    ray.get(service.follow.remote(follow), timeout=RPC_TIMEOUT_S)

    later = ", and those that appear later" if follow else ""
    return (
        f"{spec.name}: labels the {len(windows)} windows of {spec.stream_root}{later}; "
        "see `run.py das status`, end it with `run.py das stop`"
    )


def status(config: Config | None) -> Iterator[Table]:
    """Yield the tables of all services, or of the run's.

    Raises:
        UserError: no service is running.
    """
    running = _running(config)
    for service in running.values():
        state = ray.get(service.state.remote(), timeout=RPC_TIMEOUT_S)
        yield from status_tables(state)


def stop(config: Config | None) -> str:
    """End the run's service, or the only one.

    Nothing is lost: missing supervision is written when it is requested again.

    Raises:
        UserError: no service is running, or several are and `config` is None.
    """
    running = _running(config)
    if len(running) > 1:
        raise UserError(
            f"{len(running)} services are running ({', '.join(running)}): "
            "name the run with --config"
        )
    ((name, service),) = running.items()
    end(service)
    return f"{name}: ended"


def _running(config: Config | None) -> dict[str, Any]:
    """Return the running services by name, or only that of a run."""
    running = services()
    if config is None:
        if not running:
            raise UserError(
                "no DAS is running in this Ray; start one with `run.py das start --config FILE`"
            )
        return running

    name = LabelingSpec.from_config(config).name
    if name not in running:
        others = ", ".join(running) or "no service is running"
        raise UserError(
            f"no DAS of run '{config.name}' is running in this Ray ({others}); "
            "start it with `run.py das start`"
        )
    return {name: running[name]}
