"""Which snapshot may supervise which window: rule 2, in one place.

A snapshot's version v is the state of the FM after learning windows 0 .. v-1 of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from exfm_ray.config.das import DASConfig


def newest_allowed_version(window: int, fm_lag: int) -> int | None:
    """The newest version that may supervise `window`: it has learned windows <= window - fm_lag.
    None while there is no such one."""
    version = window - fm_lag + 1
    return version if version >= 1 else None


@dataclass(frozen=True)
class SnapshotPolicy:
    """Which of the versions that may supervise a window does: the newest, the newest of every k-th,
    or a pinned one."""

    fm_lag: int
    every: int = 1
    pinned: int | None = None

    @classmethod
    def from_config(cls, das: DASConfig) -> Self:
        """What the settings say."""
        return cls(das.fm_lag, das.snapshot_stride, das.pinned_version)

    @property
    def first(self) -> int:
        """The first window with a teacher."""
        return self.fm_lag + (self.pinned or 1) - 1

    def version(self, window: int) -> int | None:
        """The version that supervises `window`; None for a window without a teacher."""
        newest = newest_allowed_version(window, self.fm_lag)
        if newest is None or self.pinned is not None:
            return (
                self.pinned
                if newest is not None and self.pinned is not None and self.pinned <= newest
                else None
            )
        return newest - (newest - 1) % self.every

    def may_supervise(self, version: int, window: int) -> bool:
        """Rule 2: the version has learned no window later than window - fm_lag."""
        newest = newest_allowed_version(window, self.fm_lag)
        return newest is not None and version <= newest
