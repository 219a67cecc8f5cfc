"""Kill actors, services and drivers at random, 50 times and more: nothing is lost or doubled, and
the bytes are the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from drive_service import spec_in
from ray_environment import RAY_ENVIRONMENT
from specs import make_place, undisturbed, written

from exfm_ray.data.stream import EventStream

KILLS = 55
FILES_BETWEEN = 12
WINDOWS = 33
WAIT_S = 240
BUSY = {"RAY_worker_niceness": "0"}
"""Gives Ray's processes the normal priority on a busy machine."""
SLOW_START = "The current node timed out during startup"
"""Ray's error on a busy machine, before the driver runs: after 30 s, which no setting changes."""


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start the driver in a process of its own."""
    environment = (
        {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        | RAY_ENVIRONMENT
        | BUSY
    )
    script = Path(__file__).parents[1] / "helpers" / "drive_service.py"
    return subprocess.Popen(
        [sys.executable, str(script), str(folder)], env=environment, stderr=subprocess.PIPE
    )


def victims(driver: int) -> dict[str, list[int]]:
    """Return the processes below a driver that may be killed, by kind."""
    processes: dict[str, list[int]] = {"driver": [driver], "actor": [], "service": []}
    for process in psutil.Process(driver).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if words and words[0].startswith("ray::Scorer"):
            processes["actor"].append(process.pid)
        elif words and words[0].startswith("ray::Service"):
            processes["service"].append(process.pid)
    return processes


@pytest.mark.slow
def test_killed_at_random(tmp_path: Path) -> None:
    """Wrong: a death at some moment loses a fragment, scores one twice for the reader, or changes a
    byte (rules 3 and 5)."""
    spec = spec_in(make_place(tmp_path, windows=WINDOWS, rows=5000, fragment_rows=50))
    chance = random.Random(6)
    killed = Counter[str]()
    files = 0
    driver = start(tmp_path)
    started = since = time.monotonic()
    while driver.poll() is None or driver.returncode != 0:
        if driver.poll() is not None:
            message = driver.stderr.read().decode() if driver.stderr else ""
            assert driver.returncode == -signal.SIGKILL or SLOW_START in message, message
            driver = start(tmp_path)
        now = len(list(spec.store.root.glob("fm/window=*/fragment=*")))
        if now >= files + FILES_BETWEEN and killed.total() < KILLS:
            time.sleep(chance.random() * 0.3)
            if driver.poll() is None and (
                among := victims(driver.pid)[
                    kind := chance.choices(("actor", "service", "driver"), (6, 3, 1))[0]
                ]
            ):
                os.kill(chance.choice(among), signal.SIGKILL)
                killed[kind] += 1
                files = now
                since = time.monotonic()
                if kind == "driver":
                    driver.wait()
        assert time.monotonic() - since < WAIT_S, f"no progress after {killed}"
        time.sleep(0.1)  # watching takes CPU time from the processes that are watched
    print(dict(killed), f"{time.monotonic() - started:.0f} s")
    assert (
        killed.total() >= 50 and min(killed[kind] for kind in ("actor", "service", "driver")) >= 1
    )
    assert written(spec) == undisturbed(spec)
    stream = EventStream.open(spec.stream_root)
    for window in range(1, WINDOWS):
        ids = [
            i
            for f in stream.window(window).fragments
            for i in pq.read_table(spec.store.path(window, f))["example_id"].to_pylist()
        ]
        assert ids == [
            i
            for f in stream.window(window).fragments
            for i in stream.read(window, f, ["example_id"])["example_id"].to_pylist()
        ]
