"""Comparison with a student whose tables are not sharded."""

from __future__ import annotations

from collections.abc import Callable

from exfm_ray.config.root import Config

# float32 sums in another order over 40 steps, as in test_jobs
WORKERS_TOLERANCE = 1e-3


Whole = Callable[[str], Config]
