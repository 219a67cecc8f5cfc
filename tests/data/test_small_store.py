"""A feed whose blocks do not fit into Ray's object store keeps running, because Ray spills to
disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_store import FRAGMENTS, STORE, WINDOWS, WORKERS

from exfm_ray.data.feed import BLOCKS_AHEAD

HELPERS = Path(__file__).parents[1] / "helpers"
LIMIT_S = 400
"""A hang would last an hour and a half."""


@pytest.mark.slow
@pytest.mark.parametrize("size", [30_000_000, 120_000_000])
def test_blocks_larger_than_the_object_store(size: int) -> None:
    """Wrong: a fragment that is larger than the object store, or four that are so together, hang
    the job, end it or lose rows."""
    assert BLOCKS_AHEAD * size > STORE
    bare = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(HELPERS)])
    script = [sys.executable, str(HELPERS / "small_store.py"), str(size)]
    done = subprocess.run(
        script, env=bare | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = range(WINDOWS * FRAGMENTS)
    assert (
        json.loads(done.stdout.splitlines()[-1])
        == [[[number, number, size // 8] for number in numbers]] * WORKERS
    )
