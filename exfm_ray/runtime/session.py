"""Ray for a run: the cluster that the environment names, or one of this machine."""

from __future__ import annotations

import logging
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from exfm_ray.config.root import Config
from exfm_ray.errors import UserError
from exfm_ray.runtime.actors import get_with_timeout
from exfm_ray.runtime.resources import _written, logical_cpus, missing_resources

NODES_S = 120.0
"""Longest wait for all nodes of a cluster to answer."""

CONNECT_S = 5.0
"""Longest wait for a connection to the address that the environment names."""


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connect to RAY_ADDRESS, if set, or start Ray here with enough logical CPUs for every role
    side by side. A session that is open already is used as it is."""
    if ray.is_initialized():
        yield
        return
    logs = config.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    _log_to(logs / "driver.log")
    options: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        _check_one_machine(config)
        options = {
            "address": "local",
            "num_cpus": max(logical_cpus(config), os.cpu_count() or 1),
            "include_dashboard": False,
        }
        # Workers inherit the environment; a runtime_env would make Ray throw away the workers that
        # it starts ahead.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
        )
    try:
        if not options:
            _check_reachable()
        with _stderr_to(logs / "driver.log"):  # Ray's C++ core does not log, it prints
            ray.init(
                log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options
            )
    except (OSError, RuntimeError, ValueError) as error:
        if options:
            raise
        told = str(error).strip().splitlines()[0]
        raise UserError(
            f"RAY_ADDRESS is {os.environ['RAY_ADDRESS']}, and no Ray could be joined there ({told}); correct it, start that cluster, or unset it: "
            "the run then starts Ray on this machine"
        ) from None
    restrict_token_file()
    try:
        if not options:
            _check_cluster(config)
        yield
    finally:
        ray.shutdown()


def _check_one_machine(config: Config) -> None:
    """UserError where roles are to run on labelled nodes and there is no cluster."""
    for role, labels in config.placement:
        if labels:
            raise UserError(
                f"setting 'placement.{role}' asks for nodes with {_written(labels)}, but RAY_ADDRESS is not set, so the run is on this machine "
                "alone; submit it to a cluster, or leave 'placement' out"
            )


@contextmanager
def running_ray() -> Iterator[None]:
    """Connect to a Ray that runs already: RAY_ADDRESS, else the one that `ray start` has started on
    this machine. UserError without any."""
    if ray.is_initialized():
        yield
        return
    try:
        _check_reachable()
        with _stderr_to(Path(os.devnull)):
            ray.init(
                address="auto",
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
    except (OSError, RuntimeError, ValueError) as error:
        told = str(error).strip().splitlines()[0]
        raise UserError(
            f"no running Ray to connect to ({told}); set RAY_ADDRESS, or start one here with `ray start --head`"
        ) from None
    restrict_token_file()
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable() -> None:
    """OSError where nobody listens at RAY_ADDRESS; Ray itself would try for minutes."""
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), CONNECT_S).close()


def _check_cluster(config: Config) -> None:
    """Say what the run will wait for; UserError where one of the cluster's nodes does not see the
    run's folder."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    for line in missing_resources(config, nodes):
        print(line, file=sys.stderr)
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes if node["NodeID"] != here]
    marker = config.folder / "logs" / f"seen-{uuid.uuid4().hex}"
    marker.touch()
    try:
        tasks = [
            ray.remote(_exists).options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], False)
            )
            for n in others
        ]
        where = ", ".join(node["NodeManagerAddress"] for node in others)
        seen = get_with_timeout(
            [task.remote(marker) for task in tasks],
            "the run",
            f"the nodes {where} to look for {config.folder}",
            NODES_S,
        )
    finally:
        marker.unlink()
    blind = [
        node["NodeManagerAddress"] for node, sees in zip(others, seen, strict=True) if not sees
    ]
    if blind:
        raise UserError(
            f"{config.folder}: {', '.join(blind)} does not see this folder; put run.dir, or EXFM_HOME, on a file system that all nodes share"
        )


def _exists(path: Path) -> bool:
    return path.exists()


def _log_to(path: Path) -> None:
    """The libraries' own chatter goes to a file, not to the terminal."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("ray", "deepspeed", "DeepSpeed"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Send what this process writes to file descriptor 2 to a file."""
    sys.stderr.flush()
    saved = os.dup(2)
    with path.open("a") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def restrict_token_file() -> None:
    """Ray writes its token file for everyone on the machine to read."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if token.exists() and token.stat().st_uid == os.getuid():
        token.chmod(0o600)


def user_error(error: BaseException) -> UserError | None:
    """The UserError at the bottom of an error that Ray has wrapped, if there is one."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, UserError) and not isinstance(current, RayTaskError):
            return current
        failures = getattr(current, "worker_failures", {})
        waiting += [
            getattr(current, "cause", None),
            current.__cause__,
            current.__context__,
            *failures.values(),
        ]
    return None
