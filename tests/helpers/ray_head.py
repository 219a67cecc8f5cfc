"""A Ray head with a token on this machine, separate from the Ray of the other tests."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import requests

REPOSITORY = Path(__file__).parents[2]
START_S = 90.0


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for listener in sockets:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


WANDB_KEY = "0123456789abcdef0123456789abcdef01234567"


class Head:
    """`ray start --head` with token authentication and its own folder, ports and processes.

    Attributes:
        home: its EXFM_HOME.
        token: the file of its token.
        url: of its job server.
        environment: for processes that use it.
    """

    def __init__(self, cpus: int, labels: str = "") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="exfm-head-"))  # short: sockets lie in it
        self.home = self.folder / "home"
        self.token = self.folder / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        self.port, self.dashboard_port, client, agent = free_ports(4)
        self.url = f"http://127.0.0.1:{self.dashboard_port}"
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("RAY_", "PYTHONPATH"))
        }
        self.environment = inherited | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_health_check_period_ms": "1000",  # a dead node is found after 5 s, not 15
            # Ray Train notices the loss of a node up to 20 s late
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
            # Prestarted workers do not have a job's code and are discarded
            "RAY_prestart_worker_first_driver": "0",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited["PATH"]]),
            "EXFM_HOME": str(self.home),
            "WANDB_API_KEY": WANDB_KEY,
        }
        self._nodes: list[subprocess.Popen[bytes]] = []
        ports = [
            f"--port={self.port}",
            f"--dashboard-port={self.dashboard_port}",
            f"--ray-client-server-port={client}",
        ]
        dashboard = [
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-agent-listen-port={agent}",
        ]
        self._start(
            [
                "--head",
                *ports,
                *dashboard,
                f"--num-cpus={cpus}",
                f"--labels={labels}",
                f"--temp-dir={self.folder / 'ray'}",
            ]
        )
        self._wait()

    def _start(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a node; all its processes descend from the returned one."""
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--object-store-memory=200000000",
            *arguments,
        ]
        log = (self.folder / f"node{len(self._nodes)}.log").open("wb")
        node = subprocess.Popen(
            command,
            env={**self.environment, **(environment or {})},
            stdout=log,
            stderr=log,
            cwd=self.folder,
        )
        self._nodes.append(node)
        return node

    def _wait(self) -> None:
        ends = time.monotonic() + START_S
        while time.monotonic() < ends:
            assert self._nodes[0].poll() is None, (self.folder / "node0.log").read_text()
            try:
                if (
                    self.get("/api/jobs/", self.token.read_text()).status_code == 200
                    and self.alive()
                ):
                    return
            except requests.ConnectionError:
                pass
            time.sleep(0.3)
        raise AssertionError((self.folder / "node0.log").read_text())

    def get(self, path: str, token: str | None = None) -> requests.Response:
        """Send a GET to the head's HTTP server, with or without a token."""
        return requests.get(
            self.url + path,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=10,
        )

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the nodes."""
        roots = [psutil.Process(node.pid) for node in self._nodes if node.poll() is None]
        return [process for root in roots for process in (root, *root.children(recursive=True))]

    def submit(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start `run.py submit` with this head's address."""
        command = [sys.executable, "run.py", "submit", "--address", self.url, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=self.environment | environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )

    def join(self, cpus: int, labels: str = "") -> subprocess.Popen[bytes]:
        """Start another node on this machine, and wait until the head counts it."""
        ports = [f"--dashboard-agent-listen-port={free_ports(1)[0]}"]
        before = self.alive()
        address = f"{socket.gethostbyname(socket.gethostname())}:{self.port}"
        node = self._start(
            [f"--address={address}", f"--num-cpus={cpus}", f"--labels={labels}", *ports]
        )
        ends = time.monotonic() + START_S
        while self.alive() <= before:
            assert time.monotonic() < ends and node.poll() is None, (
                self.folder / f"node{len(self._nodes) - 1}.log"
            ).read_text()
            time.sleep(0.5)
        return node

    def alive(self) -> set[str]:
        """Return the ids of the nodes that the head counts as alive."""
        rows = self.get("/nodes?view=summary", self.token.read_text()).json()["data"]["summary"]
        return {row["raylet"]["nodeId"] for row in rows if row["raylet"].get("state") == "ALIVE"}

    def list_all(self, what: str) -> list[dict[str, Any]]:
        """Return Ray's list of all "actors" or "tasks", including those that have ended."""
        url = f"/api/v0/{what}?limit=5000&detail=1"
        answer = self.get(url, self.token.read_text()).json()
        rows: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return rows

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Kill a node with all its processes."""
        root = psutil.Process(node.pid)
        for process in [*root.children(recursive=True), root]:
            process.kill()

    def stop(self) -> None:
        """Stop all processes and remove the folder."""
        alive = self.processes()
        for node in self._nodes:
            node.terminate()
        _, alive = psutil.wait_procs(alive, timeout=3)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)
