"""Comparisons of figures."""

from __future__ import annotations

import pytest

from exfm_ray.metrics.gain import ne_gain, transfer_ratio


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
