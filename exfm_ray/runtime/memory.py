"""Peak memory of a run."""

from __future__ import annotations

import psutil


class MemoryMeter:
    """Peak memory of this process and all its descendants.

    Private pages of all processes count, and of the shared pages the largest process's, once.

    Attributes:
        peak: in bytes, 0 before the first sample.
    """

    def __init__(self) -> None:
        self.peak = 0

    def sample(self) -> None:
        """Measure the memory in use now and raise the peak to it."""
        private = 0
        shared = 0
        this_process = psutil.Process()
        for process in [this_process, *this_process.children(recursive=True)]:
            try:
                memory = process.memory_info()
            except psutil.NoSuchProcess:
                continue
            private += memory.rss - memory.shared
            shared = max(shared, memory.shared)
        self.peak = max(self.peak, private + shared)
