"""What a teacher's representations say about each user, updated from window to window."""

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
    """The representations of every user's examples, summarized.

    Attributes:
        users_U: user ids, int64, ascending.
        count_U: number of examples, int64.
        total_UD: sum of the examples' representations, float32.
        last_ULD: the last L representations, float32, newest first; 0 where there are fewer.
    """

    users_U: Array
    count_U: Array
    total_UD: Array
    last_ULD: Array

    @classmethod
    def empty(cls, dim: int, last: int) -> FeatureStore:
        """Return a store without users."""
        none = np.empty(0, np.int64)
        total_UD = np.empty((0, dim), np.float32)
        last_ULD = np.empty((0, last, dim), np.float32)
        return cls(none, none, total_UD, last_ULD)

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Array],
        dim: int,
        last: int,
    ) -> FeatureStore:
        """Restore a store from `arrays()`, from which empty arrays may be left out."""
        if not arrays:
            return cls.empty(dim, last)
        users_U = arrays["users"]
        no_last_ULD = np.zeros((len(users_U), 0, dim), np.float32)
        last_ULD = arrays.get("last", no_last_ULD)
        return cls(users_U, arrays["count"], arrays["total"], last_ULD)

    def arrays(self) -> dict[str, Array]:
        """Return the arrays by their names in the file."""
        return {
            "users": self.users_U,
            "count": self.count_U,
            "total": self.total_UD,
            "last": self.last_ULD,
        }

    def transformed(self, map_DD: Array) -> FeatureStore:
        """Return the store in another embedding space: every representation times `map_DD`."""
        total_UD = (self.total_UD @ map_DD).astype(np.float32)
        last_ULD = (self.last_ULD @ map_DD).astype(np.float32)
        return FeatureStore(self.users_U, self.count_U, total_UD, last_ULD)

    def updated(self, user_N: Array, value_ND: Array) -> FeatureStore:
        """Return the store with a window's examples added.

        Args:
            user_N: the user of each example, int64. Id 0 is the missing value and is ignored.
            value_ND: the examples' representations, float32, in the order of the examples.
        """
        has_user_N = user_N > 0
        user_N = user_N[has_user_N]
        value_ND = value_ND[has_user_N]

        # V: users of the window. Their examples lie side by side, in order, from first_V on.
        order_N = np.argsort(user_N, kind="stable")
        sorted_ND = value_ND[order_N]
        user_V, first_V, count_V = np.unique(
            user_N[order_N],
            return_index=True,
            return_counts=True,
        )

        users_U = np.union1d(self.users_U, user_V)
        old_O = np.searchsorted(users_U, self.users_U)
        at_V = np.searchsorted(users_U, user_V)

        count_U = np.zeros(len(users_U), np.int64)
        count_U[old_O] = self.count_U
        count_U[at_V] += count_V

        users = len(users_U)
        dim = value_ND.shape[1]
        total_UD = np.zeros((users, dim), np.float32)
        total_UD[old_O] = self.total_UD
        if len(user_V):
            total_UD[at_V] += np.add.reduceat(sorted_ND, first_V, axis=0)

        length = self.last_ULD.shape[1]
        last_ULD = np.zeros((users, length, dim), np.float32)
        last_ULD[old_O] = self.last_ULD
        last_VLD = last_ULD[at_V]
        last_ULD[at_V] = _pushed(last_VLD, sorted_ND, first_V, count_V)
        return FeatureStore(users_U, count_U, total_UD, last_ULD)

    def summary(self, user_N: Array) -> Array:
        """Return what examples of these users get as further inputs.

        Returns:
            float32 (N, F): log(1 + number of examples), then their mean, or the last ones if the
            store has them. Unknown users get zeros.
        """
        length, width = self.last_ULD.shape[1:]
        features = 1 + max(length, 1) * width
        summary_NF = np.zeros((len(user_N), features), np.float32)
        if not len(self.users_U):
            return summary_NF

        at_N = np.searchsorted(self.users_U, user_N)
        at_N = np.minimum(at_N, len(self.users_U) - 1)
        is_known_N = self.users_U[at_N] == user_N

        # K: examples of known users.
        at_K = at_N[is_known_N]
        count_K1 = self.count_U[at_K, None]
        if length:
            last_KLD = self.last_ULD[at_K]
            values_KX = last_KLD.reshape(len(at_K), -1)
        else:
            values_KX = self.total_UD[at_K] / count_K1
        log_count_K1 = np.log1p(count_K1)
        summary_NF[is_known_N] = np.concatenate([log_count_K1, values_KX], axis=1)
        return summary_NF

    def to_user_features(self) -> UserFeatures:
        """Return the summary of every user, in the order of the users."""
        users_U = torch.from_numpy(self.users_U)
        summary_UF = torch.from_numpy(self.summary(self.users_U))
        return UserFeatures(users_U, summary_UF)


def _pushed(
    last_VLD: Array,
    sorted_ND: Array,
    first_V: Array,
    count_V: Array,
) -> Array:
    """Push a window's examples before the older ones and cut after the L newest.

    Args:
        last_VLD: each user's last representations before the window, newest first.
        sorted_ND: the window's representations, one user after the other, oldest first.
        first_V: where each user's representations begin in `sorted_ND`.
        count_V: number of each user's representations in `sorted_ND`.
    """
    pushed_VLD = np.zeros_like(last_VLD)
    newest_V = first_V + count_V - 1
    for place in range(last_VLD.shape[1]):
        is_new_V = count_V > place
        is_old_V = ~is_new_V
        pushed_VLD[is_new_V, place] = sorted_ND[newest_V[is_new_V] - place]
        pushed_VLD[is_old_V, place] = last_VLD[is_old_V, place - count_V[is_old_V]]
    return pushed_VLD


def ridge_alignment(old_ND: Array, new_ND: Array) -> Array:
    """Fit the linear map from one snapshot's representations to the next one's.

    The map is M = argmin |X M - Y|^2 + l |M - I|^2 = (X'X + l I)^-1 (X'Y + l I): ridge regression
    (Hoerl and Kennard, 1970) towards the identity. l is the mean square of X's entries (1 without
    examples, or if all entries are 0), so the penalty weighs as much as one example for each
    dimension. With many examples M is the least-squares map, without any it is the identity, and
    it leaves directions alone that no example covers.

    Args:
        old_ND: X, one snapshot's representations of some examples.
        new_ND: Y, the next snapshot's representations of the same examples.

    Returns:
        M, float64 (D, D).
    """
    x_ND = old_ND.astype(np.float64)
    y_ND = new_ND.astype(np.float64)
    identity_DD = np.eye(old_ND.shape[1])
    mean_square = float(np.square(x_ND).mean()) if x_ND.size else 0.0
    weight = mean_square or 1.0

    penalty_DD = weight * identity_DD
    left_DD = x_ND.T @ x_ND + penalty_DD
    right_DD = x_ND.T @ y_ND + penalty_DD
    map_DD: Array = np.linalg.solve(left_DD, right_DD)
    return map_DD
