"""What a teacher's representations tell of each user, kept from window to window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from exfm_ray.models.user_features import UserFeatures

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FeatureStore:
    """What is kept of every user: `users_U` ascending, number of examples, sum of their values, the
    last ones (newest first, absent ones 0)."""

    users_U: Array
    count_U: Array
    total_UD: Array
    last_ULD: Array

    @classmethod
    def empty(cls, dim: int, last: int) -> FeatureStore:
        """Of nobody."""
        none = np.empty(0, np.int64)
        return cls(none, none, np.empty((0, dim), np.float32), np.empty((0, last, dim), np.float32))

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Array],
        dim: int,
        last: int,
    ) -> FeatureStore:
        """From `arrays()`; those without an element may be left out."""
        if not arrays:
            return cls.empty(dim, last)
        return cls(
            arrays["users"],
            arrays["count"],
            arrays["total"],
            arrays.get("last", np.zeros((len(arrays["users"]), 0, dim), np.float32)),
        )

    def arrays(self) -> dict[str, Array]:
        """By their names in the file."""
        return {
            "users": self.users_U,
            "count": self.count_U,
            "total": self.total_UD,
            "last": self.last_ULD,
        }

    def transformed(self, map_DD: Array) -> FeatureStore:
        """In another space."""
        return FeatureStore(
            self.users_U,
            self.count_U,
            (self.total_UD @ map_DD).astype(np.float32),
            (self.last_ULD @ map_DD).astype(np.float32),
        )

    def updated(self, user_N: Array, value_ND: Array) -> FeatureStore:
        """With a window's examples, in order. Id 0, the missing value, is nobody and is not
        kept."""
        user_N, value_ND = user_N[user_N > 0], value_ND[user_N > 0]
        order_N = np.argsort(user_N, kind="stable")
        new_V, first_V, count_V = np.unique(user_N[order_N], return_index=True, return_counts=True)
        sorted_ND = value_ND[order_N]
        users_U = np.union1d(self.users_U, new_V)
        old_O = np.searchsorted(users_U, self.users_U)
        new_at_V = np.searchsorted(users_U, new_V)
        count_U = np.zeros(len(users_U), np.int64)
        total_UD = np.zeros((len(users_U), value_ND.shape[1]), np.float32)
        count_U[old_O], total_UD[old_O] = self.count_U, self.total_UD
        count_U[new_at_V] += count_V
        if len(new_V):
            total_UD[new_at_V] += np.add.reduceat(sorted_ND, first_V, axis=0)
        kept = self.last_ULD.shape[1]
        last_ULD = np.zeros((len(users_U), kept, value_ND.shape[1]), np.float32)
        last_ULD[old_O] = self.last_ULD
        for place in range(
            kept if len(new_V) else 0
        ):  # positions, oldest first: each window's examples push the older ones back
            has_V = count_V > place
            end_V = first_V + count_V - 1
            last_ULD[new_at_V[has_V], place] = sorted_ND[end_V[has_V] - place]
            back_V = np.maximum(place - count_V, 0)
            older_V = ~has_V
            before = np.zeros((len(new_V), value_ND.shape[1]), np.float32)
            known_V = np.isin(new_V, self.users_U)
            at_V = np.searchsorted(self.users_U, new_V[known_V])
            before[known_V] = self.last_ULD[at_V, back_V[known_V]]
            last_ULD[new_at_V[older_V], place] = before[older_V]
        return FeatureStore(users_U, count_U, total_UD, last_ULD)

    def summary(self, user_N: Array) -> Array:
        """float32 (N, F) for examples of these users: log(1 + examples), then the mean, or the last
        ones; zeros for unknown users."""
        kept, width = self.last_ULD.shape[1:]
        summary_NF = np.zeros((len(user_N), 1 + max(kept, 1) * width), np.float32)
        if not len(self.users_U):
            return summary_NF
        at_N = np.minimum(np.searchsorted(self.users_U, user_N), len(self.users_U) - 1)
        known_N = self.users_U[at_N] == user_N
        at_K = at_N[known_N]
        values_KX = (
            self.last_ULD[at_K].reshape(len(at_K), -1)
            if kept
            else self.total_UD[at_K] / self.count_U[at_K, None]
        )
        summary_NF[known_N] = np.concatenate(
            [np.log1p(self.count_U[at_K, None]), values_KX], axis=1
        )
        return summary_NF

    def to_user_features(self) -> UserFeatures:
        """What examples of each user are given, in the order of the users."""
        return UserFeatures(
            torch.from_numpy(self.users_U), torch.from_numpy(self.summary(self.users_U))
        )


def ridge_alignment(old_ND: Array, new_ND: Array) -> Array:
    """The linear map M, float64 (D, D), of what one snapshot says of examples to what the next one
    says of the same ones.

    argmin |X M - Y|^2 + l |M - I|^2 over M, which is (X'X + l I)^-1 (X'Y + l I): ridge regression
    (Hoerl and Kennard, 1970) towards the identity. l is the mean square of X's entries (1 without
    any, or where all are 0), which weighs as much as one example for each dimension. So many
    examples give plain least squares, none the identity, and directions of which no example tells
    stay as they are.
    """
    x_ND = old_ND.astype(np.float64)
    y_ND = new_ND.astype(np.float64)
    identity_DD = np.eye(old_ND.shape[1])
    weight = (float(np.square(x_ND).mean()) if x_ND.size else 0.0) or 1.0
    transformed: Array = np.linalg.solve(
        x_ND.T @ x_ND + weight * identity_DD, x_ND.T @ y_ND + weight * identity_DD
    )
    return transformed
