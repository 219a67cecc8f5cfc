"""The actors of a run that it cannot do without: where they live, and waits for their answers that
end."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from exfm_ray.errors import UserError

RPC_TIMEOUT_S = 600.0
"""Longest wait for an actor that has nothing long to do."""


def pin_to_driver_node() -> NodeAffinitySchedulingStrategy:
    """For an actor whose loss would end the run: it lives on the driver's node, whose loss ends the
    run anyway."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def get_with_timeout(
    ref: Any,
    who: str,
    what: str,
    seconds: float = RPC_TIMEOUT_S,
) -> Any:
    """What `ref` holds; UserError where `who` has waited for `what` for so many seconds."""
    try:
        return ray.get(ref, timeout=seconds)
    except GetTimeoutError:
        raise UserError(
            f"{who} waited {seconds:.0f} s for {what} and gave up; the same command goes on from the last checkpoint"
        ) from None
