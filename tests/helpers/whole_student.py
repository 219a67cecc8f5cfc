"""A student whose tables are whole, to compare with."""

from __future__ import annotations

from collections.abc import Callable

from exfm_ray.config.root import Config

# of float32 sums in another order over 40 steps, as in test_jobs
WORKERS_TOLERANCE = 1e-3


Whole = Callable[[str], Config]
