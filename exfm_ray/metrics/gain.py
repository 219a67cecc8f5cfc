"""Comparisons of figures: NE gain, transfer ratio, the NE that the truth itself reaches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exfm_ray.metrics.state import entropy


def ne_gain(ne: float | None, baseline: float | None) -> float | None:
    """(baseline - ne) / baseline: positive is better; None where either is missing."""
    return None if ne is None or not baseline else (baseline - ne) / baseline


def transfer_ratio(vm_gain: float | None, fm_gain: float | None) -> float | None:
    """Share of the teacher's NE gain that the student gets; None where the teacher has none."""
    return None if vm_gain is None or fm_gain is None or fm_gain <= 0 else vm_gain / fm_gain


def best_ne(truth_N: NDArray[np.floating], labels_N: NDArray[np.floating]) -> float | None:
    """NE of the true probabilities: their realised log loss over the entropy of the label rate; None for one class or none."""
    truth_N, labels_N = np.asarray(truth_N, np.float64), np.asarray(labels_N, np.float64)
    base = entropy(float(labels_N.mean())) if len(labels_N) else 0.0
    if not base:
        return None
    happened_N = np.where(labels_N > 0.5, truth_N, 1.0 - truth_N)
    return float(-np.log(happened_N).mean() / base)
