"""The sequence feature: what a user did strictly before an event, built while the events stream
by.

Shapes: N events of the chunk, U known users, Q users of the chunk, L length, C items of the users
of the chunk: stored ones, waiting ones and those of the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class History:
    """A sequence feature `feature`: the last `length` values of `item` among a user's events whose
    `label` was 1."""

    feature: str
    user: str
    item: str
    label: str
    length: int


class _Items(NamedTuple):
    """Items of users, ordered by user and time.

    Attributes:
        user_C: position of the user among the chunk's users.
        rank_C: rank of the time: 0 for everything in the matrix, then 1 + position among the times
            of the chunk.
        item_C: the items.
    """

    user_C: Array
    rank_C: Array
    item_C: Array


class HistoryBuilder:
    """For each user the last `length` items, in a matrix of users by `length`.

    Items of the latest time wait until time has moved on, so that an event never sees an item of
    its own instant. Only the rows of a chunk's users are touched.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._users_U = np.empty(0, np.int64)
        self._slots_U = np.empty(0, np.int64)
        self._items_UL = np.empty((0, length), np.int64)
        self._count_U = np.empty(0, np.int64)
        self._waiting_users = np.empty(0, np.int64)
        self._waiting_items = np.empty(0, np.int64)
        self._waiting_time = np.iinfo(np.int64).min

    def extend(
        self,
        users_N: Array,
        times_N: Array,
        items_N: Array,
        acted_N: Array,
    ) -> pa.ListArray:
        """The histories of N events in event order; then add these events.

        Args:
            users_N: int64.
            times_N: int64, not decreasing, also from call to call.
            items_N: int64.
            acted_N: bool, whether the event's item enters the user's history.

        Returns:
            list<int64>, the most recent item last.
        """
        if not len(users_N):
            return pa.array([], pa.list_(pa.int64()))
        users_Q = np.unique(np.concatenate([users_N, self._waiting_users]))
        slots_Q = self._slots(users_Q)
        times = np.unique(times_N)
        items = self._collect(
            users_Q, slots_Q, times, users_N[acted_N], times_N[acted_N], items_N[acted_N]
        )

        width = len(times) + 2
        key_C = items.user_C * width + items.rank_C
        first_key_N = np.searchsorted(users_Q, users_N) * width
        own_key_N = first_key_N + np.searchsorted(times, times_N) + 1
        end_N = np.searchsorted(key_C, own_key_N)
        begin_N = np.searchsorted(key_C, first_key_N)
        begin_N = np.maximum(begin_N, end_N - self.length)
        histories = gather(items.item_C, begin_N, end_N)

        last_rank = len(times)
        self._store(slots_Q, key_C, items.item_C, width, last_rank)
        waiting = items.rank_C == last_rank
        self._waiting_users = users_Q[items.user_C[waiting]]
        self._waiting_items = items.item_C[waiting]
        self._waiting_time = int(times[-1])
        return histories

    def _collect(
        self,
        users_Q: Array,
        slots_Q: Array,
        times: Array,
        new_users: Array,
        new_times: Array,
        new_items: Array,
    ) -> _Items:
        """The stored, waiting and new items of the chunk's users."""
        count_Q = self._count_U[slots_Q]
        is_stored_QL = np.arange(self.length) >= self.length - count_Q[:, None]
        waiting_rank = 1 if self._waiting_time == times[0] else 0
        stored_users = np.repeat(np.arange(len(users_Q)), count_Q)
        user_C = np.concatenate(
            [
                stored_users,
                np.searchsorted(users_Q, self._waiting_users),
                np.searchsorted(users_Q, new_users),
            ]
        )
        rank_C = np.concatenate(
            [
                np.zeros(len(stored_users), np.int64),
                np.full(len(self._waiting_users), waiting_rank),
                np.searchsorted(times, new_times) + 1,
            ]
        )
        item_C = np.concatenate(
            [
                self._items_UL[slots_Q][is_stored_QL],
                self._waiting_items,
                new_items,
            ]
        )
        by_user = np.lexsort((rank_C, user_C))
        return _Items(user_C[by_user], rank_C[by_user], item_C[by_user])

    def _store(
        self,
        slots_Q: Array,
        key_C: Array,
        item_C: Array,
        width: int,
        last_rank: int,
    ) -> None:
        """Store each user's last items before the chunk's last time, right-aligned."""
        users = len(slots_Q)
        first_key_Q = np.arange(users) * width
        start_Q = np.searchsorted(key_C, first_key_Q)
        end_Q = np.searchsorted(key_C, first_key_Q + last_rank)
        count_Q = np.minimum(end_Q - start_Q, self.length)

        place_QL = end_Q[:, None] - self.length + np.arange(self.length)
        valid_QL = np.arange(self.length) >= self.length - count_Q[:, None]
        items_QL = np.zeros((users, self.length), np.int64)
        items_QL[valid_QL] = item_C[place_QL[valid_QL]]
        self._items_UL[slots_Q] = items_QL
        self._count_U[slots_Q] = count_Q

    def _slots(self, users_Q: Array) -> Array:
        """Matrix rows of sorted, unique users. Unknown users get new ones."""
        known_users = len(self._users_U)
        place_Q = np.searchsorted(self._users_U, users_Q)
        inside_Q = place_Q < known_users
        known_Q = np.zeros(len(users_Q), bool)
        known_Q[inside_Q] = self._users_U[place_Q[inside_Q]] == users_Q[inside_Q]
        new_users = users_Q[~known_Q]
        if len(new_users):
            new_places = place_Q[~known_Q]
            new_slots = known_users + np.arange(len(new_users))
            self._users_U = np.insert(self._users_U, new_places, new_users)
            self._slots_U = np.insert(self._slots_U, new_places, new_slots)
            self._grow(len(self._users_U))
        position_Q = np.searchsorted(self._users_U, users_Q)
        return self._slots_U[position_Q]

    def _grow(self, users: int) -> None:
        """Make room for `users` users, and at least double the matrix if it is too small."""
        current = len(self._count_U)
        if users <= current:
            return
        added = max(1024, users, 2 * current) - current
        new_items = np.zeros((added, self.length), np.int64)
        new_counts = np.zeros(added, np.int64)
        self._items_UL = np.concatenate([self._items_UL, new_items])
        self._count_U = np.concatenate([self._count_U, new_counts])


def gather(
    values: Array,
    begin_N: Array,
    end_N: Array,
) -> pa.ListArray:
    """The slices values[begin:end] as a list column: list<int64>, N lists."""
    length_N = end_N - begin_N
    offsets = np.concatenate([[0], np.cumsum(length_N)])
    total = offsets[-1]
    shift = np.repeat(begin_N - offsets[:-1], length_N)
    index = np.arange(total) + shift
    flat = pa.array(values[index], pa.int64())
    offsets_32 = pa.array(offsets.astype(np.int32))
    return pa.ListArray.from_arrays(offsets_32, flat)
