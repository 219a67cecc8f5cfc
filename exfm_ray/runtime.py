"""Ray for a run: the cluster that the environment names, or one of this machine."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from exfm_ray.config import Config
from exfm_ray.errors import UserError

DATA_CPUS = 2
"""Logical CPUs left to Ray Data's read tasks; with none left the run would hang."""


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connect to RAY_ADDRESS, if set, or start Ray here with enough logical CPUs for every role side by side. A session
    that is open already is used as it is."""
    if ray.is_initialized():
        yield
        return
    logs = config.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    _log_to(logs / "driver.log")
    options: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        options = {"num_cpus": max(logical_cpus(config), os.cpu_count() or 1), "include_dashboard": False}
        # Workers inherit the environment; a runtime_env would make Ray throw away the workers that it starts ahead.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    with _stderr_to(logs / "driver.log"):  # Ray's C++ core does not log, it prints
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
    tighten_token()
    try:
        if not options:
            _check_cluster(config)
        yield
    finally:
        ray.shutdown()


def _check_cluster(config: Config) -> None:
    """Say where a cluster has too few CPUs to begin; UserError where one of its nodes does not see the run's folder."""
    asked, there = logical_cpus(config), ray.cluster_resources().get("CPU", 0)
    if there < asked:
        print(f"the cluster has {there:g} CPUs and this run asks for {asked}: it waits until nodes join", file=sys.stderr)
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    marker = config.folder / "logs" / f"seen-{uuid.uuid4().hex}"
    marker.touch()
    try:
        tasks = [ray.remote(_exists).options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], False)) for n in others]
        seen = ray.get([task.remote(marker) for task in tasks])
    finally:
        marker.unlink()
    blind = [node["NodeManagerAddress"] for node, sees in zip(others, seen, strict=True) if not sees]
    if blind:
        raise UserError(
            f"{config.folder}: {', '.join(blind)} does not see this folder; put run.dir, or EXFM_HOME, on a file system that all nodes share"
        )


def _exists(path: Path) -> bool:
    return path.exists()


def logical_cpus(config: Config) -> int:
    """CPUs that the roles, or a sweep's trials, ask for, and some for Ray Data."""
    jobs = 1 if config.vm.share_pass else len(config.vm.models)
    roles = config.fm.workers + config.vm.workers * jobs + config.das.max_actors
    return max(roles, config.tune.concurrent if config.tune else 0) + DATA_CPUS


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


def tighten_token() -> None:
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
        if type(current) is UserError:
            return current
        failures = getattr(current, "worker_failures", {})
        waiting += [getattr(current, "cause", None), current.__cause__, current.__context__, *failures.values()]
    return None


class MemoryMeter:
    """Peak memory of this process and all its descendants, in bytes: their own pages, and the largest shared part once."""

    def __init__(self) -> None:
        self.peak = 0

    def sample(self) -> None:
        """Measure now."""
        own, shared = 0, 0
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                memory = process.memory_info()
            except psutil.NoSuchProcess:
                continue
            own += memory.rss - memory.shared
            shared = max(shared, memory.shared)
        self.peak = max(self.peak, own + shared)
