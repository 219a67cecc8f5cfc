"""Publishes student data in a thread, while fragments are scored."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from exfm_ray.das.queue import OpenWindow
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.data.stream import EventStream


class StudentDataPublisher:
    """Publishes one window after the other, because user histories are made in order."""

    def __init__(self, spec: LabelingSpec, stream: EventStream) -> None:
        self._spec = spec
        self._stream = stream
        self._thread = ThreadPoolExecutor(1, "student-data")
        self._running: dict[int, Future[None]] = {}

    def ensure_published(
        self,
        window: OpenWindow,
        will_be_scored: Callable[[int], bool],
    ) -> bool:
        """Return True once a window's student data is committed; until then see to it.

        Args:
            window: the window.
            will_be_scored: says whether another window is still to be scored. The window before
                is waited for only if it will be. Otherwise this one is tried and fails with the
                reason.

        Raises:
            Exception: the data could not be made.
        """
        data = self._spec.student_data
        index = window.manifest.index
        if data is None or data.has(index):
            self._running.pop(index, None)
            return True

        if index in self._running:
            if self._running[index].done():
                self._running.pop(index).result()
        elif data.ready(index) or not will_be_scored(index - 1):
            self._running[index] = self._thread.submit(
                data.publish,
                stream=self._stream,
                snapshots=self._spec.snapshots,
                window=window.manifest,
                version=window.version,
            )
        return False
