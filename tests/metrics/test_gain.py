"""Comparisons of normalized entropy: gain, transfer ratio, spread over seeds, pooled windows."""

from __future__ import annotations

import numpy as np
import pytest

from exfm_ray.metrics.gain import (
    exceeds_spread,
    gains_over_labels,
    ne_gain,
    pool,
    transfer_ratio,
)
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


def test_gains_over_labels() -> None:
    """Wrong: student and teacher are compared with different baselines, or the labels arm gets a
    ratio over itself."""
    assert gains_over_labels(0.9, 1.0, 0.8) == pytest.approx((0.1, 0.2, 0.5))
    assert gains_over_labels(1.0, 1.0, 0.8, is_labels_arm=True) == (0.0, pytest.approx(0.2), None)
    assert gains_over_labels(0.9, None, 0.8) == (None, None, None)


def test_exceeds_spread() -> None:
    """Wrong: a gain within its spread over seeds counts, or a single seed has a spread."""
    assert exceeds_spread([0.02, 0.03, 0.025])
    assert not exceeds_spread([0.01, -0.01, 0.02])
    assert exceeds_spread([0.01]) and not exceeds_spread([-0.01]) and not exceeds_spread([])


def test_pooled_windows_are_the_windows_together() -> None:
    """Wrong: windows of different sizes and label rates are averaged, not summed."""
    rng = np.random.default_rng(0)
    windows = [
        MetricState.from_logits(rng.normal(size=size), rng.random(size) < rate)
        for size, rate in ((200, 0.5), (50, 0.1))
    ]
    together = (windows[0] + windows[1]).figures()
    empty = MetricState().figures()
    pooled = pool([*(window.figures() for window in windows), empty])
    assert pooled.examples == together["examples"] and pooled.has_all_predictions
    for name in ("ne", "log_loss", "calibration", "label_rate"):
        assert getattr(pooled, name) == pytest.approx(together[name], rel=1e-12)


def test_pooled_windows_without_positives() -> None:
    """Wrong: a window whose calibration is undefined ends in an error, or goes unnoticed."""
    no_positives = MetricState.from_logits(np.zeros(10), np.zeros(10)).figures()
    some = MetricState.from_logits(np.zeros(4), np.array([0, 1, 0, 1])).figures()
    pooled = pool([no_positives, some])
    assert not pooled.has_all_predictions
    assert pooled.calibration == pytest.approx(1.0)
    assert pool([no_positives]).ne is None and pool([no_positives]).calibration is None
    with pytest.raises(ValueError, match="nothing to pool"):
        pool([])
