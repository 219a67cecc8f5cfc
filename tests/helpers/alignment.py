"""Ridge regression by hand."""

from __future__ import annotations

import numpy as np

from exfm_ray.stores.feature_store import Array


def aligned_slowly(old_ND: Array, new_ND: Array) -> Array:
    """Least squares with a pseudo-example for each dimension, which stays as it is: as large as an
    example's value is."""
    size = np.sqrt(np.mean(np.square(old_ND.astype(np.float64)))) * np.eye(old_ND.shape[1])
    found: Array = np.linalg.lstsq(
        np.concatenate([old_ND, size]), np.concatenate([new_ND, size]), rcond=None
    )[0]
    return found
