"""On which nodes of a cluster each role runs: labels that a node must have, all of them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from exfm_ray.base import FrozenModel

_WORD = "[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
"""Kubernetes' syntax of labels, which is Ray's, too."""


def _key(key: str) -> str:
    if not re.fullmatch(f"({_WORD}/)?{_WORD}", key):
        raise ValueError(
            f"'{key}' is no name of a label: letters, digits, '-', '_' and '.', at most 63, a letter or digit first and last"
        )
    return key


def _value(value: str) -> str:
    if not re.fullmatch(_WORD, value):
        raise ValueError(
            "no value of a label: letters, digits, '-', '_' and '.', at most 63, a letter or digit first and last"
        )
    return value


Labels = dict[Annotated[str, AfterValidator(_key)], Annotated[str, AfterValidator(_value)]]
"""Ray gives a node its labels with `ray start --labels`."""


class PlacementConfig(FrozenModel):
    """Labels of the nodes for the workers of FM and VMs (trials of a sweep, too), the DAS's actors,
    and what reads the data: Ray Data's tasks and the feeds. Without labels any node does."""

    fm: Labels = Field({})
    vm: Labels = Field({})
    das: Labels = Field({})
    data: Labels = Field({})
