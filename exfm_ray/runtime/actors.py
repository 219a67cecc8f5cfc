"""Actors that a run cannot do without: where they live, and calls to them that end."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from exfm_ray.errors import UserError

RPC_TIMEOUT_S = 600.0
"""Longest wait for a call to an actor that has nothing long to do."""


def pin_to_driver_node() -> NodeAffinitySchedulingStrategy:
    """Return the scheduling strategy for an actor whose loss would end the run.

    The actor lives on the driver's node, whose loss ends the run anyway.
    """
    node = ray.get_runtime_context().get_node_id()
    return NodeAffinitySchedulingStrategy(node, soft=False)


def get_with_timeout(
    ref: Any,
    who: str,
    what: str,
    seconds: float = RPC_TIMEOUT_S,
) -> Any:
    """Return the value of a Ray object reference, or of a list of them.

    Args:
        ref: what `ray.get` takes.
        who: the waiting part of the run, for the error message.
        what: what it waits for, for the error message.
        seconds: longest wait.

    Raises:
        UserError: the value did not come in time.
    """
    try:
        return ray.get(ref, timeout=seconds)
    except GetTimeoutError:
        raise UserError(
            f"{who} waited {seconds:.0f} s for {what} and gave up; "
            "rerun the same command to resume from the last checkpoint"
        ) from None
