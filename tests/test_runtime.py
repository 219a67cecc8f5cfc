"""Ray's wrapping taken off errors, the CPUs a run asks for, memory measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ray
from small_runs import small_config

from exfm_ray.errors import UserError
from exfm_ray.runtime import DATA_CPUS, logical_cpus, user_error

REPOSITORY = Path(__file__).parents[1]


def test_finds_the_mistake_below_other_errors() -> None:
    """Wrong: a user reads Ray's wrapping instead of the mistake, or a cycle of errors hangs the search."""
    mistake = UserError("here")

    class WrapperError(Exception):
        def __init__(self, **attributes: object) -> None:
            vars(self).update(attributes)

    caused = RuntimeError("outer")
    caused.__cause__ = WrapperError(cause=mistake)
    context = RuntimeError("later")
    context.__context__ = mistake
    cycle = RuntimeError("cycle")
    cycle.__cause__ = WrapperError(cause=cycle)
    for error in (mistake, caused, context, WrapperError(worker_failures={0: ValueError(), 1: caused})):
        assert user_error(error) is mistake
    for error in (cycle, ValueError("no mistake of a user")):
        assert user_error(error) is None


@ray.remote(num_cpus=0)
class Failing:
    """Raises what a scorer or a feed raises."""

    def __init__(self, at_start: bool) -> None:
        if at_start:
            raise UserError("no stream here")

    def fail(self) -> None:
        raise UserError("no window here")


@pytest.mark.parametrize(("at_start", "told"), [(True, "no stream here"), (False, "no window here")])
def test_finds_the_mistake_that_an_actor_made(cluster: None, at_start: bool, told: str) -> None:
    """Wrong: a mistake that an actor finds, at its start or later, keeps its traceback."""
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(Failing.remote(at_start).fail.remote())
    assert told in str(user_error(caught.value) or caught.value)
    assert at_start or str(user_error(caught.value)) == told


def test_asks_for_cpus_for_every_role_and_for_the_data(tmp_path: Path) -> None:
    """Wrong: Ray has no CPU left for reading and the run hangs."""
    config = small_config(tmp_path, "x", fm={"workers": 3}, vm={"workers": 2, "share_pass": False}, das={"max_actors": 4})
    assert logical_cpus(config) == 3 + 2 * 2 + 4 + DATA_CPUS
    shared = config.model_copy(update={"vm": config.vm.model_copy(update={"share_pass": True})})
    assert logical_cpus(shared) == 3 + 2 + 4 + DATA_CPUS


MEASURE = """
from exfm_ray.runtime import MemoryMeter
meter = MemoryMeter(); meter.sample(); before = meter.peak
block = bytearray(b"x") * (300 << 20); meter.sample(); full = meter.peak
del block; meter.sample()
print(before, full, meter.peak)
"""


def test_memory_is_a_peak() -> None:
    """Wrong: the peak misses memory, counts it twice, or falls again."""
    measured = subprocess.run([sys.executable, "-c", MEASURE], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    before, full, after = (int(word) for word in measured.split())
    assert 290 << 20 < full - before < 310 << 20
    assert after == full
