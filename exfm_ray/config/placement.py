"""Node labels that decide where in a cluster each role runs."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from exfm_ray.base import FrozenModel

_WORD = "[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
"""The syntax of Kubernetes labels, which Ray uses, too."""

_RULE = "letters, digits, '-', '_' and '.', at most 63, a letter or digit first and last"


def _check_key(key: str) -> str:
    if not re.fullmatch(f"({_WORD}/)?{_WORD}", key):
        raise ValueError(f"'{key}' is not a valid label name: {_RULE}")
    return key


def _check_value(value: str) -> str:
    if not re.fullmatch(_WORD, value):
        raise ValueError(f"not a valid label value: {_RULE}")
    return value


LabelKey = Annotated[str, AfterValidator(_check_key)]
LabelValue = Annotated[str, AfterValidator(_check_value)]
Labels = dict[LabelKey, LabelValue]
"""Ray gives a node its labels with `ray start --labels`."""


class PlacementConfig(FrozenModel):
    """Labels of the nodes that each role may run on.

    A node must have all labels of a role. A role without labels runs on any node.
    """

    fm: Labels = Field({}, description="Nodes for the FM's workers: label -> value; empty: any.")
    vm: Labels = Field(
        {}, description="Nodes for the vertical models' workers and a sweep's trials; empty: any."
    )
    das: Labels = Field({}, description="Nodes for the DAS's actors; empty: any.")
    data: Labels = Field(
        {}, description="Nodes for readers: Ray Data's tasks and the feeds; empty: any."
    )
