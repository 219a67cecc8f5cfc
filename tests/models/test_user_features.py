"""What is kept of each user: look-ups, and changes that lead from one store to the next bit for
bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from exfm_ray.models.user_features import UserFeatures

BITS = st.sampled_from(
    [0x00000000, 0x80000000, 0x3F800000, 0x3F800001, 0xC0000000]
)  # 0, -0, 1, the next number, -2
STORES = st.dictionaries(st.integers(1, 9), st.tuples(BITS, BITS), max_size=6)


def past(store: dict[int, tuple[int, ...]]) -> UserFeatures:
    users = sorted(store)
    bits = np.array([store[user] for user in users], np.uint32).reshape(len(users), 2)
    return UserFeatures(
        torch.tensor(users, dtype=torch.int64), torch.from_numpy(bits.view(np.float32).copy())
    )


def as_dict(found: UserFeatures) -> dict[int, tuple[int, ...]]:
    return dict(
        zip(
            found.users_U.tolist(),
            map(tuple, found.inputs_UF.numpy().view(np.uint32).tolist()),
            strict=True,
        )
    )


@given(old=STORES, new=STORES)
def test_changes_lead_to_the_new_store(
    old: dict[int, tuple[int, ...]], new: dict[int, tuple[int, ...]]
) -> None:
    """Wrong: a changed or new user is left out, an unchanged one is carried along, or users are no
    longer in order."""
    new = {**old, **new}  # a store never loses users
    changed = past(new).changed_since(past(old))
    assert as_dict(changed) == {
        user: inputs for user, inputs in new.items() if old.get(user) != inputs
    }
    assert as_dict(past(old).updated(changed)) == new and past(old).updated(
        changed
    ).users_U.tolist() == sorted(new)


@given(store=STORES, asked=st.lists(st.integers(0, 10), max_size=5))
def test_unknown_users_have_zeros(store: dict[int, tuple[int, ...]], asked: list[int]) -> None:
    """Wrong: a user reads another's inputs, above all those beyond either end of the store."""
    found = past(store).of(torch.tensor(asked, dtype=torch.int64))
    assert list(map(tuple, found.numpy().view(np.uint32).tolist())) == [
        store.get(user, (0, 0)) for user in asked
    ]


def test_files_hold_what_was_written(tmp_path: Path) -> None:
    """Wrong: a store changes when it is written and read, or an empty one cannot be written."""
    for store in ({}, {3: (1, 2), 7: (0, 5)}):
        past(store).write(tmp_path)
        assert as_dict(UserFeatures.read(tmp_path)) == store
