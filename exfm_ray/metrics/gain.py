"""Comparisons of normalized entropy (NE): gain over a baseline, transfer ratio, pooling of windows.

    NE gain        = (baseline NE - NE) / baseline NE        positive is better
    transfer ratio = NE gain of the student / NE gain of its teacher, both over the same baseline

The baseline is the student's arm that learns from labels alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from exfm_ray.metrics.state import entropy


class Gains(NamedTuple):
    """What one arm gains over the labels arm, as fractions; None where a figure is undefined.

    Attributes:
        ne_gain: NE gain of the student.
        fm_ne_gain: NE gain of the foundation model on the same examples.
        transfer_ratio: the first over the second; None for the labels arm itself.
    """

    ne_gain: float | None
    fm_ne_gain: float | None
    transfer_ratio: float | None


@dataclass(frozen=True)
class PooledFigures:
    """Figures of the examples of several windows together.

    Attributes:
        examples: number of examples.
        labels: number of positive examples.
        log_loss: mean log loss in nats.
        predictions: sum of the predicted probabilities over the windows that have positives.
        has_all_predictions: whether every window has positives, so that `predictions` is complete.
    """

    examples: int
    labels: float
    log_loss: float
    predictions: float
    has_all_predictions: bool

    @property
    def label_rate(self) -> float:
        """The fraction of examples that are positive."""
        return self.labels / self.examples

    @property
    def ne(self) -> float | None:
        """Log loss over the entropy of the label rate; None where all labels are equal."""
        baseline = entropy(self.label_rate)
        return self.log_loss / baseline if baseline else None

    @property
    def calibration(self) -> float | None:
        """Predictions over labels, windows without positives left out; None without labels."""
        if not self.labels:
            return None
        return self.predictions / self.labels


def ne_gain(ne: float | None, baseline: float | None) -> float | None:
    """(baseline - ne) / baseline: positive is better; None where either is missing."""
    if ne is None or not baseline:
        return None
    return (baseline - ne) / baseline


def transfer_ratio(student_gain: float | None, teacher_gain: float | None) -> float | None:
    """The fraction of the teacher's NE gain that the student gets.

    Returns:
        None where either gain is missing, or where the teacher has no gain to transfer.
    """
    if student_gain is None or teacher_gain is None:
        return None
    if teacher_gain <= 0:
        return None
    return student_gain / teacher_gain


def gains_over_labels(
    ne: float | None,
    labels_ne: float | None,
    fm_ne: float | None,
    is_labels_arm: bool = False,
) -> Gains:
    """Compare one arm with the labels arm and with the foundation model.

    Args:
        ne: NE of the arm.
        labels_ne: NE of the labels arm of the same student.
        fm_ne: NE of the foundation model on the student's examples.
        is_labels_arm: whether the arm is the labels arm, which has no transfer ratio.
    """
    gain = ne_gain(ne, labels_ne)
    fm_gain = ne_gain(fm_ne, labels_ne)
    ratio = None if is_labels_arm else transfer_ratio(gain, fm_gain)
    return Gains(gain, fm_gain, ratio)


def exceeds_spread(gains: Sequence[float]) -> bool:
    """Whether the mean of gains over seeds is above their standard deviation.

    A single seed has a spread of 0. Where a teacher's gain is within its spread, a transfer ratio
    says nothing.
    """
    if not gains:
        return False
    mean = np.mean(gains)
    spread = np.std(gains, ddof=1) if len(gains) > 1 else 0.0
    return bool(mean > spread)


def pool(rows: Iterable[Mapping[str, Any]]) -> PooledFigures:
    """Pool rows of metrics.jsonl of one model, arm, domain and task over their windows.

    Args:
        rows: rows with `examples`, `label_rate`, `log_loss` and `calibration`, in the order in
            which they are summed; rows without examples are skipped.

    Raises:
        ValueError: no row has examples.
    """
    examples = 0
    labels = log_loss = predictions = 0.0
    has_all_predictions = True
    for row in rows:
        window_examples = row["examples"]
        if not window_examples:
            continue
        window_labels = window_examples * row["label_rate"]

        examples += window_examples
        labels += window_labels
        log_loss += window_examples * row["log_loss"]
        if row["calibration"] is None:
            has_all_predictions = False
        else:
            predictions += window_labels * row["calibration"]

    if not examples:
        raise ValueError("no window has examples, so there is nothing to pool")
    return PooledFigures(
        examples=examples,
        labels=labels,
        log_loss=log_loss / examples,
        predictions=predictions,
        has_all_predictions=has_all_predictions,
    )
