"""How much memory a run uses."""

from __future__ import annotations

import psutil


class MemoryMeter:
    """Peak memory of this process and all its descendants, in bytes: their own pages, and the
    largest shared part once."""

    def __init__(self) -> None:
        self.peak = 0

    def sample(self) -> None:
        """Measure now."""
        own = 0
        shared = 0
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                memory = process.memory_info()
            except psutil.NoSuchProcess:
                continue
            own += memory.rss - memory.shared
            shared = max(shared, memory.shared)
        self.peak = max(self.peak, own + shared)
