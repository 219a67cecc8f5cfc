"""Selects the snapshot that scores a window, since some may be damaged; removes old snapshots."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from exfm_ray.das.student_data import StudentData
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotError, SnapshotStore

DEBOUNCE_S = 0.3
"""Failures of a version that are nearer to each other count as one."""


class SnapshotSelector:
    """The usable versions of one teacher.

    A version that could not be loaded `max_attempts` times is left out.
    """

    def __init__(
        self,
        snapshots: SnapshotStore,
        policy: SnapshotPolicy,
        max_attempts: int,
    ) -> None:
        self._snapshots = snapshots
        self._policy = policy
        self._max_attempts = max_attempts
        # Version -> number of failures, and time of the last one by the monotonic clock.
        self._failures: dict[int, tuple[int, float]] = {}
        # Version that is left out -> why.
        self._causes: dict[int, str] = {}

    def choose(self, window: int) -> int | None:
        """Return the version that scores a window.

        That is the version that the policy asks for. If it is damaged, it is the newest usable
        version before it, unless a version is pinned.

        Returns:
            None while the version is not published yet.

        Raises:
            SnapshotError: no version can score the window.
        """
        planned = self._policy.version(window)
        assert planned is not None, "a window without a teacher"
        published = self._snapshots.versions()
        is_published = planned in published
        if not is_published and max(published, default=0) < planned:
            return None

        cause = self._causes.get(planned)
        if is_published and cause is None:
            return planned
        fallback = self._newest_usable_before(planned, published)
        if fallback is not None and self._policy.pinned is None:
            return fallback
        teacher = self._snapshots.teacher
        raise SnapshotError(
            cause
            or f"snapshot {planned} of teacher '{teacher}' is not there, though later ones are"
        )

    def _newest_usable_before(self, version: int, published: Sequence[int]) -> int | None:
        usable = [v for v in published if v < version and v not in self._causes]
        return max(usable, default=None)

    def failed(self, version: int, cause: str) -> bool:
        """Note that a load has failed; return True if the version is left out from now on."""
        now = time.monotonic()
        failures, last_s = self._failures.get(version, (0, 0.0))
        # Several actors may report the same moment, one after the other.
        if now - last_s > DEBOUNCE_S:
            failures += 1
            self._failures[version] = (failures, now)
        if failures >= self._max_attempts:
            self._causes[version] = cause
        return version in self._causes

    def forget_faults(self) -> None:
        """Try versions again that were left out: they may have been repaired."""
        self._failures.clear()
        self._causes.clear()

    def remove_unneeded(
        self,
        unfinished: Iterable[int],
        next_window: int,
        student_data: StudentData | None = None,
    ) -> None:
        """Delete the versions that no window needs any more.

        The newest usable version before the needed ones stays, in case one of them is damaged.

        Args:
            unfinished: windows that are not committed.
            next_window: the first window that is still to come.
            student_data: what windows get beside predictions, which may need further versions.
        """
        published = self._snapshots.versions()
        windows = [*unfinished, next_window]
        planned = [self._policy.version(window) for window in windows]
        needed = [version for version in planned if version is not None]
        if student_data and published:
            needed += student_data.extra_versions(windows, published[-1])

        oldest = min(needed, default=1)
        fallback = self._newest_usable_before(oldest, published)
        self._snapshots.remove_before(oldest if fallback is None else fallback)
