"""Features of each user that a model with a history reads, as its last dense features.

They are stored beside the model and served with it.

<folder>/history.safetensors   users int64 (U) ascending, rows of the key's table;
                               inputs float32 (U, F)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exfm_ray.storage.atomic import atomic_path

HISTORY = "history.safetensors"


@dataclass(frozen=True)
class UserFeatures:
    """The features of some users.

    Attributes:
        users_U: the users, ascending.
        inputs_UF: the features of each user.
    """

    users_U: Tensor
    inputs_UF: Tensor

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the features from a folder whose hashes have been checked."""
        tensors = load_file(folder / HISTORY)
        users_U = tensors["users"]
        inputs_UF = tensors["inputs"]
        return cls(users_U, inputs_UF)

    def write(self, folder: Path) -> None:
        """Write the features; equal features give equal bytes."""
        tensors = {"users": self.users_U.contiguous(), "inputs": self.inputs_UF.contiguous()}
        with atomic_path(folder / HISTORY) as temporary:
            save_file(tensors, temporary)

    def of(self, user_N: Tensor) -> Tensor:
        """The features of the users of examples, inputs_NF; zeros for unknown users."""
        features = self.inputs_UF.shape[1]
        inputs_NF = self.inputs_UF.new_zeros(len(user_N), features)
        if not len(self.users_U):
            return inputs_NF

        position_N = torch.searchsorted(self.users_U, user_N.contiguous())
        position_N = position_N.clamp(max=len(self.users_U) - 1)
        known_N = self.users_U[position_N] == user_N
        inputs_NF[known_N] = self.inputs_UF[position_N[known_N]]
        return inputs_NF

    def changed_since(self, old: UserFeatures) -> UserFeatures:
        """The users that are new, or whose inputs differ in a bit."""
        old_bits_UF = old.of(self.users_U).view(torch.int32)
        bits_UF = self.inputs_UF.view(torch.int32)
        is_equal_U = (old_bits_UF == bits_UF).all(dim=1)
        is_old_U = torch.isin(self.users_U, old.users_U)
        changed_U = ~(is_equal_U & is_old_U)
        return UserFeatures(self.users_U[changed_U], self.inputs_UF[changed_U])

    def updated(self, changed: UserFeatures) -> UserFeatures:
        """These features with the users of `changed` replaced or added."""
        unchanged_U = ~torch.isin(self.users_U, changed.users_U)
        users_U = torch.cat([self.users_U[unchanged_U], changed.users_U])
        inputs_UF = torch.cat([self.inputs_UF[unchanged_U], changed.inputs_UF])
        sorted_users_U, order_U = users_U.sort()
        return UserFeatures(sorted_users_U, inputs_UF[order_U])
