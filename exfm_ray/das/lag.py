"""Which snapshot may supervise which window: rule 2, in one place.

A snapshot's version v is the state of the FM after learning windows 0 .. v-1 of the stream.
"""

from __future__ import annotations


def version_for(window: int, fm_lag: int) -> int | None:
    """The version that supervises `window`: it has learned windows <= window - fm_lag. None while there is no such one."""
    version = window - fm_lag + 1
    return version if version >= 1 else None
