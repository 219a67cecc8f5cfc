"""Which snapshot may supervise which window: rule 2, in one place.

A snapshot's version v is the state of the FM after it has learned windows 0 .. v-1 of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from exfm_ray.config.das import DASConfig
from exfm_ray.errors import UserError


def newest_allowed_version(window: int, fm_lag: int) -> int | None:
    """Return the newest version that may supervise `window`, None if there is none yet.

    That version has learned the windows up to window - fm_lag.
    """
    version = window - fm_lag + 1
    return version if version >= 1 else None


@dataclass(frozen=True)
class SnapshotPolicy:
    """Selects one of the versions that may supervise a window.

    Attributes:
        fm_lag: how many windows the snapshot is behind the window that it supervises, at least.
        every: take only versions 1, 1 + every, 1 + 2 * every ...; the newest of them.
        pinned: take this version for all windows; None takes the newest.
    """

    fm_lag: int
    every: int = 1
    pinned: int | None = None

    @classmethod
    def from_config(cls, das: DASConfig) -> Self:
        """Return the policy that the settings ask for."""
        return cls(das.fm_lag, das.snapshot_stride, das.pinned_version)

    @property
    def first(self) -> int:
        """The first window with a teacher."""
        return self.fm_lag + (self.pinned or 1) - 1

    def version(self, window: int) -> int | None:
        """Return the version that supervises `window`, None for a window without a teacher."""
        newest = newest_allowed_version(window, self.fm_lag)
        if newest is None:
            return None
        if self.pinned is not None:
            return self.pinned if self.pinned <= newest else None
        return newest - (newest - 1) % self.every

    def may_supervise(self, version: int, window: int) -> bool:
        """Return True if the version has learned no window later than window - fm_lag (rule 2)."""
        newest = newest_allowed_version(window, self.fm_lag)
        return newest is not None and version <= newest

    def refuse_later_snapshot(
        self,
        version: int,
        window: int,
        action: str,
    ) -> None:
        """Check rule 2 before a snapshot is used for a window.

        Args:
            version: the snapshot.
            window: the window.
            action: what the snapshot is about to do, in the passive: "scored by".

        Raises:
            UserError: the snapshot may have learned from the window.
        """
        if self.may_supervise(version, window):
            return
        raise UserError(
            f"window {window} must not be {action} snapshot {version}: with das.fm_lag = "
            f"{self.fm_lag} it takes one that has learned no window after {window - self.fm_lag}"
        )

    def replaced_version(self, version: int, window: int) -> int | None:
        """Return the version that `version` replaces for this window as a fallback, if any."""
        planned = self.version(window)
        return None if version == planned else planned

    def accepts(
        self,
        version: int,
        replaced: int | None,
        window: int,
    ) -> bool:
        """Return True if data of `version` may be used for a window under these settings.

        Args:
            version: the snapshot that made the data.
            replaced: the version that it replaced as a fallback, None if it replaced none.
            window: the window that the data is for.
        """
        planned = version if replaced is None else replaced
        return planned == self.version(window) and self.may_supervise(version, window)
