"""The Ray session of a run: the cluster that RAY_ADDRESS names, or one on this machine."""

from __future__ import annotations

import logging
import os
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from exfm_ray.config.root import Config
from exfm_ray.errors import UserError
from exfm_ray.runtime.actors import get_with_timeout
from exfm_ray.runtime.resources import format_labels, logical_cpus, missing_resources

RPC_TIMEOUT_S = 120.0
"""Longest wait for all nodes of a cluster to answer."""

CONNECT_TIMEOUT_S = 5.0
"""Longest wait for a connection to the address that the environment names."""

CONNECT_ERRORS = (OSError, RuntimeError, ValueError)
"""What `ray.init` raises when it cannot connect."""

logger = logging.getLogger(__name__)


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connect to RAY_ADDRESS, or start Ray on this machine if that is not set.

    Ray on this machine gets enough logical CPUs to run every role at the same time. A session that
    is open already is used unchanged.

    Raises:
        UserError: there is no Ray at RAY_ADDRESS, `placement` names labeled nodes but there is no
            cluster, or a node of the cluster does not see the run's folder.
    """
    if ray.is_initialized():
        yield
        return

    log = config.folder / "logs" / "driver.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    _log_to(log)
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _connect(address, log)
    else:
        _start_local(config, log)
    restrict_token_file()
    try:
        if address:
            _check_cluster(config)
        yield
    finally:
        ray.shutdown()


def _connect(address: str, log: Path) -> None:
    try:
        _check_reachable()
        _init_ray(log)
    except CONNECT_ERRORS as error:
        raise UserError(
            f"RAY_ADDRESS is {address}, and no Ray could be joined there ({_first_line(error)}); "
            "correct it, start that cluster, or unset it: the run then starts Ray on this machine"
        ) from None


def _start_local(config: Config, log: Path) -> None:
    _check_one_machine(config)
    # Workers inherit the environment. A runtime_env would make Ray discard its prestarted workers.
    code = str(Path(__file__).parents[2])
    search_path = [code, os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
    cpus = max(logical_cpus(config), os.cpu_count() or 1)
    _init_ray(log, address="local", num_cpus=cpus, include_dashboard=False)


def _init_ray(log: Path, **options: Any) -> None:
    """Call `ray.init`; what Ray's C++ core prints goes to `log`."""
    with _redirect_stderr(log):
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            **options,
        )


def _check_one_machine(config: Config) -> None:
    """Raise UserError if a role requests labeled nodes; a single machine has none."""
    for role, labels in config.placement:
        if labels:
            raise UserError(
                f"setting 'placement.{role}' asks for nodes with {format_labels(labels)}, "
                "but RAY_ADDRESS is not set, so the run is on this machine alone; "
                "submit it to a cluster, or leave 'placement' out"
            )


@contextmanager
def running_ray() -> Iterator[None]:
    """Connect to a running Ray: RAY_ADDRESS, else the one that `ray start` started here.

    Raises:
        UserError: no Ray is running.
    """
    if ray.is_initialized():
        yield
        return
    try:
        _check_reachable()
        _init_ray(Path(os.devnull), address="auto")
    except CONNECT_ERRORS as error:
        raise UserError(
            f"no running Ray to connect to ({_first_line(error)}); "
            "set RAY_ADDRESS, or start one here with `ray start --head`"
        ) from None
    restrict_token_file()
    try:
        yield
    finally:
        ray.shutdown()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0]


def _check_reachable() -> None:
    """Raise OSError if nothing listens at RAY_ADDRESS; Ray itself would try for minutes."""
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        connection = socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S)
        connection.close()


def _check_cluster(config: Config) -> None:
    """Warn about what the run will wait for, and check that all nodes see the run's folder.

    Raises:
        UserError: a node does not see the folder.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    for message in missing_resources(config, nodes):
        logger.warning(message)

    this_node = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes if node["NodeID"] != this_node]
    marker = config.folder / "logs" / f"seen-{uuid.uuid4().hex}"
    marker.touch()
    try:
        visible = _visible_on(others, marker, config.folder)
    finally:
        marker.unlink()

    blind = []
    for node, sees in zip(others, visible, strict=True):
        if not sees:
            blind.append(node["NodeManagerAddress"])
    if blind:
        raise UserError(
            f"{config.folder}: {', '.join(blind)} does not see this folder; "
            "put run.dir, or EXFM_HOME, on a file system that all nodes share"
        )


def _visible_on(
    nodes: Sequence[Mapping[str, Any]],
    marker: Path,
    folder: Path,
) -> list[bool]:
    """Return for each node whether the file `marker` in `folder` exists there."""
    refs = []
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], False)
        task = ray.remote(_exists).options(num_cpus=0, scheduling_strategy=strategy)
        refs.append(task.remote(marker))
    addresses = ", ".join(node["NodeManagerAddress"] for node in nodes)
    what = f"the nodes {addresses} to look for {folder}"
    visible: list[bool] = get_with_timeout(refs, "the run", what, RPC_TIMEOUT_S)
    return visible


def _exists(path: Path) -> bool:
    return path.exists()


def _log_to(path: Path) -> None:
    """Send the libraries' log messages to a file instead of the terminal."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("ray", "deepspeed", "DeepSpeed"):
        library = logging.getLogger(name)
        library.handlers[:] = [handler]
        library.propagate = False


@contextmanager
def _redirect_stderr(path: Path) -> Iterator[None]:
    """Append what this process writes to file descriptor 2 to a file; Ray's C++ core prints."""
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
    """Make Ray's token file readable for its owner only; Ray creates it readable for everyone."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    token = Path(named or Path.home() / ".ray" / "auth_token")
    if token.exists() and token.stat().st_uid == os.getuid():
        token.chmod(0o600)


def user_error(error: BaseException) -> UserError | None:
    """Return the UserError inside an error that Ray has wrapped, if there is one."""
    seen: set[int] = set()
    candidates: list[object] = [error]
    while candidates:
        current = candidates.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, UserError) and not isinstance(current, RayTaskError):
            return current

        worker_failures = getattr(current, "worker_failures", {})
        candidates += [
            getattr(current, "cause", None),
            current.__cause__,
            current.__context__,
            *worker_failures.values(),
        ]
    return None
