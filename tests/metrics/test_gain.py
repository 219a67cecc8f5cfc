"""Comparisons of figures."""

from __future__ import annotations

import numpy as np
import pytest

from exfm_ray.metrics.gain import best_ne, ne_gain, transfer_ratio
from exfm_ray.metrics.state import MetricState


def test_ne_gain() -> None:
    """Wrong: the sign or the base of the gain is the other one."""
    assert ne_gain(0.9, 1.0) == pytest.approx(0.1)
    assert ne_gain(0.99, 0.9) == pytest.approx(-0.1)
    assert ne_gain(None, 0.9) is None and ne_gain(0.9, None) is None


def test_transfer_ratio() -> None:
    """Wrong: a ratio is given where the teacher has no gain to transfer."""
    assert transfer_ratio(0.02, 0.04) == pytest.approx(0.5)
    assert transfer_ratio(-0.01, 0.04) == pytest.approx(-0.25)
    assert transfer_ratio(0.02, 0.0) is None and transfer_ratio(0.02, -0.01) is None
    assert transfer_ratio(None, 0.04) is None and transfer_ratio(0.02, None) is None


def test_best_ne_is_the_ne_of_the_truth_and_no_noisy_model_beats_it() -> None:
    """Wrong: the bar that models are held against is not the truth's own NE."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-1.5, 1.2, 50_000)
    truth = 1 / (1 + np.exp(-logits))
    labels = (rng.random(50_000) < truth).astype(np.float32)
    best = best_ne(truth, labels)
    assert best == pytest.approx(MetricState.of(logits, labels).figures()["ne"], rel=1e-9)
    assert best < MetricState.of(logits + rng.normal(0, 0.5, 50_000), labels).figures()["ne"]


def test_best_ne_where_undefined_or_certain() -> None:
    """Wrong: one class or certain truths divide by zero."""
    assert best_ne(np.array([0.2]), np.array([0.0])) is None and best_ne(np.array([]), np.array([])) is None
    assert best_ne(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0.0
