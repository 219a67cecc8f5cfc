"""Comparisons of figures: NE gain and transfer ratio."""

from __future__ import annotations


def ne_gain(ne: float | None, baseline: float | None) -> float | None:
    """(baseline - ne) / baseline: positive is better; None where either is missing."""
    return None if ne is None or not baseline else (baseline - ne) / baseline


def transfer_ratio(vm_gain: float | None, fm_gain: float | None) -> float | None:
    """Share of the teacher's NE gain that the student gets; None where the teacher has none."""
    return None if vm_gain is None or fm_gain is None or fm_gain <= 0 else vm_gain / fm_gain
