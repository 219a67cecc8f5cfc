"""What a model with a history reads of each user, as it is stored beside the model and served: its
last dense features.

<folder>/history.safetensors   users int64 (U) ascending, rows of the key's table; inputs float32
(U, F)
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
    """Users, ascending, and the inputs of each."""

    users_U: Tensor
    inputs_UF: Tensor

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of a folder whose hashes were checked."""
        tensors = load_file(folder / HISTORY)
        return cls(tensors["users"], tensors["inputs"])

    def write(self, folder: Path) -> None:
        """Equal pasts, equal bytes."""
        with atomic_path(folder / HISTORY) as temporary:
            save_file(
                {"users": self.users_U.contiguous(), "inputs": self.inputs_UF.contiguous()},
                temporary,
            )

    def of(self, user_N: Tensor) -> Tensor:
        """inputs_NF of examples of these users; zeros for those who are not there."""
        inputs_NF = self.inputs_UF.new_zeros(len(user_N), self.inputs_UF.shape[1])
        if len(self.users_U):
            at_N = torch.searchsorted(self.users_U, user_N.contiguous()).clamp(
                max=len(self.users_U) - 1
            )
            known_N = self.users_U[at_N] == user_N
            inputs_NF[known_N] = self.inputs_UF[at_N[known_N]]
        return inputs_NF

    def changed_since(self, old: UserFeatures) -> UserFeatures:
        """Users that are new, or of whose inputs a bit is another one."""
        same_U = (old.of(self.users_U).view(torch.int32) == self.inputs_UF.view(torch.int32)).all(
            dim=1
        ) & torch.isin(self.users_U, old.users_U)
        return UserFeatures(self.users_U[~same_U], self.inputs_UF[~same_U])

    def updated(self, changed: UserFeatures) -> UserFeatures:
        """With the users of `changed` as they are there."""
        kept_U = ~torch.isin(self.users_U, changed.users_U)
        users_U, order_U = torch.cat([self.users_U[kept_U], changed.users_U]).sort()
        return UserFeatures(
            users_U, torch.cat([self.inputs_UF[kept_U], changed.inputs_UF])[order_U]
        )
