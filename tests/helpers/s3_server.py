"""A real S3 server (moto) in a process on this machine, so no test needs an account."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

BUCKET = "tests"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "of-the-tests",
    "AWS_SECRET_ACCESS_KEY": "hidden-in-the-tests",
    "AWS_EC2_METADATA_DISABLED": "true",
}
START_S = 120


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


@dataclass
class S3:
    """A server with one bucket."""

    address: str
    log: Path

    def url(self, prefix: str, bucket: str = BUCKET) -> str:
        """Return the URL of a prefix for the setting run.storage."""
        return (
            f"s3://{bucket}/{prefix}?endpoint_override={self.address}&scheme=http&region=us-east-1"
        )

    def ask(
        self,
        path: str,
        method: str,
        data: bytes = b"",
    ) -> None:
        """Send a request without credentials."""
        request = Request(
            f"http://{self.address}/{path}",
            data=data,
            method=method,
            headers={"Content-Type": "text/plain"},
        )
        urlopen(request, timeout=30).close()

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Refuse all requests inside the block, as if the credentials were unknown."""
        self.ask("moto-api/reset-auth", "POST", b"0")
        try:
            yield
        finally:
            self.ask("moto-api/reset-auth", "POST", b"inf")

    def requests(self) -> list[str]:
        """Return method and address of each request so far."""
        lines = self.log.read_text().splitlines()
        return [line.split('"')[1] for line in lines if line.count('"') >= 2]


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """Run a server whose log is in `folder`."""
    port = free_port()
    server = S3(f"127.0.0.1:{port}", folder / "moto.log")
    with server.log.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                server.ask(BUCKET, "PUT")
                break
            except OSError:  # not up yet, or busy
                assert process.poll() is None and time.monotonic() < deadline, (
                    server.log.read_text()
                )
                time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()


os.environ |= ENVIRONMENT
