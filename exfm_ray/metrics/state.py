"""Metrics of a model as an additive state.

States of batches, fragments and workers add up to the state of the window.

NE (He et al. 2014, "Practical lessons from predicting clicks on ads at Facebook") is log loss over
the entropy of the mean label rate of the same examples: 1 is no better than always predicting the
average. Calibration is the sum of the predictions over the sum of the labels.

Shape suffixes: N examples, G groups, C bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

BINS = 2**16
LOGIT_RANGE = 20.0
"""AUC ranks logits by bins of width 40 / 2**16 = 0.0006; pairs within one bin count half.
Probabilities beyond e^-20 tie."""

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def _no_counts() -> Counts:
    return np.zeros(BINS, np.int64)


@dataclass(frozen=True)
class MetricState:
    """Sums over examples; the empty state by default.

    Attributes:
        examples: number of examples.
        labels: sum of the labels.
        predictions: sum of the predicted probabilities.
        log_loss: sum of the log losses in nats.
        group_weight: number of examples in groups with both classes.
        group_auc: sum over those groups of examples times the group's AUC.
        positives_C: number of positive examples with a logit in each bin.
        negatives_C: number of negative examples with a logit in each bin.
    """

    examples: int = 0
    labels: float = 0.0
    predictions: float = 0.0
    log_loss: float = 0.0
    group_weight: float = 0.0
    group_auc: float = 0.0
    positives_C: Counts = field(default_factory=_no_counts)
    negatives_C: Counts = field(default_factory=_no_counts)

    @classmethod
    def from_logits(
        cls,
        logits_N: NDArray[Any],
        labels_N: NDArray[Any],
        groups_N: NDArray[Any] | None = None,
    ) -> Self:
        """Compute the state of some examples.

        Args:
            logits_N: logits of the examples.
            labels_N: labels, 0 or 1.
            groups_N: ids of the examples' groups, for grouped AUC. AUC within a group compares
                only examples of one call, so pass the whole window at once.

        Raises:
            ValueError: a logit is not finite.
        """
        z_N = np.asarray(logits_N, np.float64)
        y_N = np.asarray(labels_N, np.float64)
        if not np.isfinite(z_N).all():
            raise ValueError(
                f"{(~np.isfinite(z_N)).sum()} of {len(z_N)} logits are not finite: "
                "the model has diverged; lower its learning rates"
            )
        positive_N = y_N > 0.5

        log_probability_N = -np.logaddexp(0.0, -z_N)
        wrong_way_N = np.where(positive_N, -z_N, z_N)
        log_loss_N = np.logaddexp(0.0, wrong_way_N)

        group_weight = group_auc = 0.0
        if groups_N is not None:
            group_weight, group_auc = _grouped_auc(z_N, positive_N, np.asarray(groups_N))

        bins_N = _bins(z_N)
        return cls(
            examples=len(z_N),
            labels=float(y_N.sum()),
            predictions=float(np.exp(log_probability_N).sum()),
            log_loss=float(log_loss_N.sum()),
            group_weight=group_weight,
            group_auc=group_auc,
            positives_C=np.bincount(bins_N[positive_N], minlength=BINS),
            negatives_C=np.bincount(bins_N[~positive_N], minlength=BINS),
        )

    def __add__(self, other: MetricState) -> MetricState:
        """The state of the examples of both states together."""
        names = [field.name for field in fields(self)]
        return MetricState(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def figures(self) -> dict[str, float | None]:
        """The metrics by name; None where undefined (no examples, one class).

        Returns:
            ne, auc, gauc, log_loss, calibration, label_rate and examples.
        """
        label_rate = _ratio(self.labels, self.examples)
        log_loss = _ratio(self.log_loss, self.examples)
        baseline = entropy(label_rate) if label_rate is not None else 0.0
        return {
            "ne": _ratio(log_loss, baseline),
            "auc": _auc(self.positives_C, self.negatives_C),
            "gauc": _ratio(self.group_auc, self.group_weight),
            "log_loss": log_loss,
            "calibration": _ratio(self.predictions, self.labels),
            "label_rate": label_rate,
            "examples": self.examples,
        }

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Arrays for `np.savez` or a checkpoint, with only the bins that have examples."""
        sums = [self.labels, self.predictions, self.log_loss, self.group_weight, self.group_auc]
        examples_C = self.positives_C + self.negatives_C
        used = np.flatnonzero(examples_C)
        bins = [used, self.positives_C[used], self.negatives_C[used]]
        return {
            "examples": np.array(self.examples, np.int64),
            "sums": np.array(sums, np.float64),
            "bins": np.stack(bins),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Restore exactly the state that `to_arrays` wrote."""
        labels, predictions, log_loss, group_weight, group_auc = arrays["sums"].tolist()
        used, positives, negatives = arrays["bins"]

        positives_C = _no_counts()
        positives_C[used] = positives
        negatives_C = _no_counts()
        negatives_C[used] = negatives
        return cls(
            examples=int(arrays["examples"]),
            labels=labels,
            predictions=predictions,
            log_loss=log_loss,
            group_weight=group_weight,
            group_auc=group_auc,
            positives_C=positives_C,
            negatives_C=negatives_C,
        )


def entropy(rate: float) -> float:
    """Entropy in nats of a label of this rate; 0 where the rate is 0 or 1."""
    if not 0 < rate < 1:
        return 0.0
    positive = -rate * np.log(rate)
    negative = (1 - rate) * np.log1p(-rate)
    return float(positive - negative)


def _ratio(numerator: float | None, denominator: float) -> float | None:
    """None where the numerator is missing or the denominator is 0."""
    if numerator is None or not denominator:
        return None
    return numerator / denominator


def _bins(z_N: Floats) -> Counts:
    bins_per_unit = BINS / (2 * LOGIT_RANGE)
    position_N = (z_N + LOGIT_RANGE) * bins_per_unit
    return np.clip(position_N, 0, BINS - 1).astype(np.int64)


def _auc(positives_C: Counts, negatives_C: Counts) -> float | None:
    """The fraction of pairs (positive, negative) in the right order, ties half; None without pairs.

    Computed in floats, because the product of the counts overflows.
    """
    float_negatives_C = negatives_C.astype(np.float64)
    pairs = float(positives_C.sum()) * float(float_negatives_C.sum())
    if not pairs:
        return None

    below_C = np.cumsum(float_negatives_C) - float_negatives_C
    ordered_pairs = (positives_C * (below_C + float_negatives_C / 2)).sum()
    return float(ordered_pairs / pairs)


def _grouped_auc(
    z_N: Floats,
    positive_N: NDArray[np.bool_],
    groups_N: NDArray[Any],
) -> tuple[float, float]:
    """Exact AUC within groups that have both classes, by average ranks.

    A group of n examples with P positives, whose ranks add up to R, has
    AUC = (R - P (P + 1) / 2) / (P (n - P)).

    Returns:
        The number of examples in those groups, and the sum of examples times AUC.
    """
    if not len(z_N):
        return 0.0, 0.0

    order_N = np.lexsort((z_N, groups_N))
    groups_N = groups_N[order_N]
    z_N = z_N[order_N]
    positive_N = positive_N[order_N]

    new_group_N = np.r_[True, groups_N[1:] != groups_N[:-1]]
    group_N = np.cumsum(new_group_N) - 1
    first_G = np.flatnonzero(new_group_N)
    size_G = np.bincount(group_N)

    rank_N = _average_ranks(z_N, new_group_N) - first_G[group_N]
    rank_sum_G = np.bincount(group_N, weights=rank_N * positive_N)
    positives_G = np.bincount(group_N, weights=positive_N)
    pairs_G = positives_G * (size_G - positives_G)

    both_G = pairs_G > 0
    ordered_pairs_G = rank_sum_G - positives_G * (positives_G + 1) / 2
    auc_G = ordered_pairs_G[both_G] / pairs_G[both_G]
    examples_G = size_G[both_G]
    return float(examples_G.sum()), float((examples_G * auc_G).sum())


def _average_ranks(z_N: Floats, new_group_N: NDArray[np.bool_]) -> Floats:
    """Ranks from 1 of sorted logits over all examples; equal logits of a group share their mean."""
    new_value_N = np.r_[True, z_N[1:] != z_N[:-1]]
    new_tie_N = new_group_N | new_value_N
    tie_first = np.flatnonzero(new_tie_N)
    tie_size = np.bincount(np.cumsum(new_tie_N) - 1)
    return np.repeat(tie_first + (tie_size + 1) / 2, tie_size)
