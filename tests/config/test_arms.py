"""Arms: what is written is what is meant, in one form."""

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
    """Wrong: an option is lost, or a plain arm is given something."""
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
    ("text", "told"),
    [
        ("kdd", "'kdd': unknown objective 'kdd'; .*Did you mean 'kd'"),
        ("ah+shared", r"'ah\+shared': unknown option 'shared'.*Did you mean 'share'"),
        ("ah+share+share", r"names option 'share' twice"),
        ("share", "unknown objective 'share'"),
        ("", "unknown objective ''"),
    ],
)
def test_mistakes_are_told(text: str, told: str) -> None:
    """Wrong: a misspelt arm is trained as another one."""
    with pytest.raises(ValueError, match=told):
        Arm(text)
    with pytest.raises(ValidationError, match=told):
        Holder(arms=(text,))  # type: ignore[arg-type]


def test_an_arm_is_its_name_everywhere() -> None:
    """Wrong: configs, metrics or Ray's messages hold an arm in another form than the one that is
    read again."""
    held = Holder.model_validate({"arms": ["labels", "ah+share"]})
    arm = held.arms[1]
    assert yaml.safe_load(yaml.safe_dump(held.model_dump(mode="json"))) == {
        "arms": ["labels", "ah+share"]
    }
    again = pickle.loads(pickle.dumps(arm))
    assert (
        type(again) is Arm
        and again == arm
        and again.options == arm.options
        and again.objective is Objective.AH
    )
    assert (
        json.dumps({arm: arm}) == '{"ah+share": "ah+share"}'
        and f"{arm}" == "ah+share"
        and {arm: 1}["ah+share"] == 1
    )
    assert type(str(arm)) is str
