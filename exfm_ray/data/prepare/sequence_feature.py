"""The sequence feature: what a user did strictly before an event, built while the events stream
by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class History:
    """The last `length` values of `item` in a user's events whose `label` was 1, as the sequence
    feature `feature`."""

    feature: str
    user: str
    item: str
    label: str
    length: int


class HistoryBuilder:
    """Per user the last `length` items: a matrix of users by `length`, touched only where a chunk's
    users stand.

    Items of the latest time stay aside until time has moved on, so that an event never sees one of
    its own instant. Shapes: N events of the chunk, U users known, Q users of the chunk, L length, C
    items in play.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._users_U = np.empty(0, np.int64)
        self._slots_U = np.empty(0, np.int64)
        self._items_UL = np.empty((0, length), np.int64)
        self._count_U = np.empty(0, np.int64)
        self._held = (np.empty(0, np.int64), np.empty(0, np.int64))
        self._held_time = np.iinfo(np.int64).min

    def extend(
        self,
        users_N: Array,
        times_N: Array,
        items_N: Array,
        acted_N: Array,
    ) -> pa.ListArray:
        """The histories of N events in event order, list<int64> with the most recent item last;
        then learn these events.

        Args:
            users_N, times_N, items_N: int64; times not decreasing, also from call to call.
            acted_N: bool, whether the event's item enters the user's history.
        """
        if not len(users_N):
            return pa.array([], pa.list_(pa.int64()))
        held_users, held_items = self._held
        known_Q = np.unique(np.concatenate([users_N, held_users]))
        slots_Q = self._slots(known_Q)
        moments = np.unique(times_N)
        # Ranks of times: 0 for everything in the matrix, 1 + position for the times of this chunk.
        held_rank = 1 if self._held_time == moments[0] else 0
        count_Q = self._count_U[slots_Q]
        stored = np.arange(self.length) >= self.length - count_Q[:, None]
        user_C = np.concatenate(
            [
                np.repeat(np.arange(len(known_Q)), count_Q),
                np.searchsorted(known_Q, held_users),
                np.searchsorted(known_Q, users_N[acted_N]),
            ]
        )
        item_C = np.concatenate([self._items_UL[slots_Q][stored], held_items, items_N[acted_N]])
        rank_C = np.concatenate(
            [
                np.zeros(int(count_Q.sum()), np.int64),
                np.full(len(held_users), held_rank),
                np.searchsorted(moments, times_N[acted_N]) + 1,
            ]
        )
        width = len(moments) + 2
        key_C = user_C * width + rank_C
        order = np.argsort(key_C, kind="stable")
        key_C = key_C[order]
        item_C = item_C[order]
        user_C = user_C[order]

        asked_N = np.searchsorted(known_Q, users_N)
        end_N = np.searchsorted(key_C, asked_N * width + np.searchsorted(moments, times_N) + 1)
        begin_N = np.maximum(np.searchsorted(key_C, asked_N * width), end_N - self.length)
        result = gather(item_C, begin_N, end_N)
        self._store(slots_Q, key_C, item_C, width, len(moments))
        late = key_C % width == len(moments)
        self._held = (known_Q[user_C[late]], item_C[late])
        self._held_time = int(moments[-1])
        return result

    def _store(
        self,
        slots_Q: Array,
        key_C: Array,
        item_C: Array,
        width: int,
        last_rank: int,
    ) -> None:
        """Put each user's last items of before the chunk's last time into the matrix,
        right-aligned."""
        start_Q = np.searchsorted(key_C, np.arange(len(slots_Q)) * width)
        end_Q = np.searchsorted(key_C, np.arange(len(slots_Q)) * width + last_rank)
        kept_Q = np.minimum(end_Q - start_Q, self.length)
        place_QL = end_Q[:, None] - self.length + np.arange(self.length)
        valid_QL = np.arange(self.length) >= self.length - kept_Q[:, None]
        rows_QL = np.zeros((len(slots_Q), self.length), np.int64)
        rows_QL[valid_QL] = item_C[place_QL[valid_QL]]
        self._items_UL[slots_Q] = rows_QL
        self._count_U[slots_Q] = kept_Q

    def _slots(self, known_Q: Array) -> Array:
        """Matrix rows of sorted, unique users; unknown users get new ones."""
        place = np.searchsorted(self._users_U, known_Q)
        inside = place < len(self._users_U)
        found = np.zeros(len(known_Q), bool)
        found[inside] = self._users_U[place[inside]] == known_Q[inside]
        fresh = known_Q[~found]
        if len(fresh):
            slots = len(self._users_U) + np.arange(len(fresh))
            self._users_U = np.insert(self._users_U, place[~found], fresh)
            self._slots_U = np.insert(self._slots_U, place[~found], slots)
            self._grow(len(self._users_U))
        return self._slots_U[np.searchsorted(self._users_U, known_Q)]

    def _grow(self, users: int) -> None:
        if users <= len(self._count_U):
            return
        room = max(1024, users, 2 * len(self._count_U)) - len(self._count_U)
        self._items_UL = np.concatenate([self._items_UL, np.zeros((room, self.length), np.int64)])
        self._count_U = np.concatenate([self._count_U, np.zeros(room, np.int64)])


def gather(
    values: Array,
    begin_N: Array,
    end_N: Array,
) -> pa.ListArray:
    """The slices values[begin:end] as a list column: list<int64>, N lists."""
    lengths = end_N - begin_N
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    index = np.arange(offsets[-1]) + np.repeat(begin_N - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(values[index], pa.int64())
    )
