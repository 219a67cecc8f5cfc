"""Which published snapshot scores a window, where some may be damaged; and which may go."""

from __future__ import annotations

import time
from collections.abc import Iterable

from exfm_ray.das.student_data import StudentData
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotError, SnapshotStore

DEBOUNCE_S = 0.3
"""Failures nearer to each other than this count once."""


class SnapshotSelector:
    """The versions of one teacher. A version that could not be loaded `tries` times is left out."""

    def __init__(
        self,
        snapshots: SnapshotStore,
        policy: SnapshotPolicy,
        tries: int,
    ) -> None:
        self._snapshots = snapshots
        self._policy = policy
        self._tries = tries
        self._failures: dict[int, tuple[int, float]] = {}
        self._causes: dict[int, str] = {}

    def choose(self, window: int) -> int | None:
        """The version that the policy asks for; where that is damaged, the newest whole one before
        it, unless a version is pinned.

        None while the version asked for is still to come. SnapshotError where there is none to
        score with.
        """
        asked = self._policy.version(window)
        assert asked is not None, "a window without a teacher"
        published = self._snapshots.versions()
        if asked not in published and not any(version > asked for version in published):
            return None
        cause = self._causes.get(asked)
        if asked in published and not cause:
            return asked
        for version in reversed(published if self._policy.pinned is None else []):
            if version < asked and version not in self._causes:
                return version
        raise SnapshotError(
            cause
            or f"snapshot {asked} of teacher '{self._snapshots.teacher}' is not there, though later ones are"
        )

    def failed(self, version: int, cause: str) -> bool:
        """A load has failed; True when the version is left out from now on."""
        number, before_s = self._failures.get(version, (0, 0.0))
        if (
            time.monotonic() - before_s > DEBOUNCE_S
        ):  # several actors, one after the other, tell of one and the same moment
            self._failures[version] = (number + 1, time.monotonic())
        if self._failures[version][0] >= self._tries:
            self._causes[version] = cause
        return version in self._causes

    def forget_faults(self) -> None:
        """Versions that were left out are tried again: they may be repaired."""
        self._failures.clear()
        self._causes.clear()

    def remove_unneeded(
        self,
        unfinished: Iterable[int],
        to_come: int,
        gifts: StudentData | None = None,
    ) -> None:
        """Delete the versions that neither these windows nor their gifts need, nor any from
        `to_come` on; the one before those stays, lest one of them be damaged."""
        published = self._snapshots.versions()
        windows = [*unfinished, to_come]
        needed = gifts.extra_versions(windows, published[-1]) if gifts and published else []
        oldest = min(
            [
                *needed,
                *(
                    version
                    for window in windows
                    if (version := self._policy.version(window)) is not None
                ),
            ],
            default=1,
        )
        kept = max(
            (version for version in published if version < oldest and version not in self._causes),
            default=oldest,
        )
        self._snapshots.remove_before(kept)
