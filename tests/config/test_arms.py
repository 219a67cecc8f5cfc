"""Arms: parsing, and one form of the name everywhere."""

from __future__ import annotations

import json
import pickle

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from exfm_ray.config.arms import ALL_OBJECTIVES, LABELS, Arm, Objective, Option


class Holder(BaseModel):
    arms: tuple[Arm, ...]


@pytest.mark.parametrize("objective", Objective)
def test_parts_of_an_arm(objective: Objective) -> None:
    """Wrong: an option is lost, or a plain arm has one."""
    plain = Arm(objective)
    shared = Arm(f"{objective}+share")
    assert (
        plain in ALL_OBJECTIVES
        and plain == objective
        and not plain.options
        and not plain.shares_tables
    )
    assert (shared.objective, shared.options, shared.shares_tables) == (
        objective,
        {Option.SHARE},
        True,
    )
    assert shared.uses_supervision == plain.uses_supervision == (objective != "labels")
    assert LABELS == "labels" and shared != plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kdd", "'kdd': unknown objective 'kdd'; .*Did you mean 'kd'"),
        ("ah+shared", r"'ah\+shared': unknown option 'shared'.*Did you mean 'share'"),
        ("ah+share+share", r"names option 'share' twice"),
        ("share", "unknown objective 'share'"),
        ("", "unknown objective ''"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    """Wrong: a misspelled arm is trained as another one."""
    with pytest.raises(ValueError, match=message):
        Arm(text)
    with pytest.raises(ValidationError, match=message):
        Holder(arms=(text,))  # type: ignore[arg-type]


def test_an_arm_is_its_name_everywhere() -> None:
    """Wrong: configs, metrics or Ray's messages write an arm in a form that does not load again."""
    holder = Holder.model_validate({"arms": ["labels", "ah+share"]})
    arm = holder.arms[1]
    assert yaml.safe_load(yaml.safe_dump(holder.model_dump(mode="json"))) == {
        "arms": ["labels", "ah+share"]
    }
    unpickled = pickle.loads(pickle.dumps(arm))
    assert (
        type(unpickled) is Arm
        and unpickled == arm
        and unpickled.options == arm.options
        and unpickled.objective is Objective.AH
    )
    assert (
        json.dumps({arm: arm}) == '{"ah+share": "ah+share"}'
        and f"{arm}" == "ah+share"
        and {arm: 1}["ah+share"] == 1
    )
    assert type(str(arm)) is str
