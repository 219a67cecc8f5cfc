"""Actors, services and drivers killed at random, 50 times and more: nothing lost, nothing doubled,
the same bytes."""

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
from drive_service import order_in
from ray_environment import RAY_ENVIRONMENT
from specs import make_place, undisturbed, written

from exfm_ray.data.stream import EventStream

KILLS = 55
FILES_BETWEEN = 12
WINDOWS = 33
WAIT_S = 240
BUSY = {"RAY_worker_niceness": "0"}
"""On a busy machine Ray's processes do not stand behind all others."""
SLOW_START = "The current node timed out during startup"
"""Ray's word on a busy machine, before there is a driver: after 30 s, which no setting changes."""


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The driver in a process of its own."""
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
    """The processes below a driver that may be killed, by what they are."""
    found: dict[str, list[int]] = {"driver": [driver], "actor": [], "service": []}
    for process in psutil.Process(driver).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if words and words[0].startswith("ray::Scorer"):
            found["actor"].append(process.pid)
        elif words and words[0].startswith("ray::Service"):
            found["service"].append(process.pid)
    return found


@pytest.mark.slow
def test_killed_at_random(tmp_path: Path) -> None:
    """Wrong: some death at some moment loses a fragment, scores one twice for the reader, or makes
    another byte (rules 3 and 5)."""
    order = order_in(make_place(tmp_path, windows=WINDOWS, rows=5000, fragment_rows=50))
    chance = random.Random(6)
    killed = Counter[str]()
    files = 0
    driver = start(tmp_path)
    started = since = time.monotonic()
    while driver.poll() is None or driver.returncode != 0:
        if driver.poll() is not None:
            told = driver.stderr.read().decode() if driver.stderr else ""
            assert driver.returncode == -signal.SIGKILL or SLOW_START in told, told
            driver = start(tmp_path)
        now = len(list(order.store.root.glob("fm/window=*/fragment=*")))
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
        time.sleep(0.1)  # to look costs the processes that are looked at their time
    print(dict(killed), f"{time.monotonic() - started:.0f} s")
    assert (
        killed.total() >= 50 and min(killed[kind] for kind in ("actor", "service", "driver")) >= 1
    )
    assert written(order) == undisturbed(order)
    stream = EventStream.open(order.stream_root)
    for window in range(1, WINDOWS):
        ids = [
            i
            for f in stream.window(window).fragments
            for i in pq.read_table(order.store.path(window, f))["example_id"].to_pylist()
        ]
        assert ids == [
            i
            for f in stream.window(window).fragments
            for i in stream.read(window, f, ["example_id"])["example_id"].to_pylist()
        ]
