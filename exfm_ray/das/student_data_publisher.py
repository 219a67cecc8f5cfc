"""A window's student data is written in a thread, beside the scoring."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from exfm_ray.das.queue import OpenWindow
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.data.stream import EventStream


class StudentDataPublisher:
    """One thread, for histories are made in order."""

    def __init__(self, order: LabelingSpec, stream: EventStream) -> None:
        self._order = order
        self._stream = stream
        self._thread = ThreadPoolExecutor(1, "gifts")
        self._making: dict[int, Future[None]] = {}

    def ensure_published(self, window: OpenWindow, comes: Callable[[int], bool]) -> bool:
        """True when students have what they are given; otherwise it is being made, or waits for the
        window before.

        Args:
            comes: whether a window is still to be made. One that is not is not waited for: to make
                this one fails, and says why.

        Raises:
            Exception: it could not be made.
        """
        gifts = self._order.gifts
        index = window.manifest.index
        if gifts is None or gifts.has(index):
            self._making.pop(index, None)
            return True
        if index in self._making:
            if self._making[index].done():
                self._making.pop(index).result()
        elif gifts.ready(index) or not comes(index - 1):
            self._making[index] = self._thread.submit(
                gifts.publish, self._stream, self._order.snapshots, window.manifest, window.version
            )
        return False
