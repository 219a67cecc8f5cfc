"""Figures of a model as a summable state: states of batches, fragments and workers add up to the
state of the window.

NE (He et al. 2014, "Practical lessons from predicting clicks on ads at Facebook") is log loss over
the entropy of the mean label rate of the same examples: 1 is no better than always saying the
average. Calibration is the sum of the predictions over the sum of the labels. Shape suffixes: N
examples, G groups, C bins.
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
        examples: how many.
        labels, predictions, log_loss: sums of labels, of predicted probabilities, of log losses in
            nats.
        positives_C, negatives_C: how many examples of each class have a logit in each bin.
        group_weight, group_auc: over groups with both classes, sum of examples and sum of examples
            times the group's AUC.
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
        """State of examples given their logits, their labels (0 or 1) and, for grouped AUC, the ids
        of their groups.

        AUC within a group compares only examples of one call: give the whole window at once.
            ValueError for a logit that is not finite.
        """
        z_N = np.asarray(logits_N, np.float64)
        y_N = np.asarray(labels_N, np.float64)
        if not np.isfinite(z_N).all():
            raise ValueError(
                f"{(~np.isfinite(z_N)).sum()} of {len(z_N)} logits are not finite: the model has diverged; lower its learning rates"
            )
        positive_N = y_N > 0.5
        bins_N = _bins(z_N)
        weight, auc = (
            (0.0, 0.0) if groups_N is None else _grouped_auc(z_N, positive_N, np.asarray(groups_N))
        )
        return cls(
            examples=len(z_N),
            labels=float(y_N.sum()),
            predictions=float(np.exp(-np.logaddexp(0.0, -z_N)).sum()),
            log_loss=float(np.logaddexp(0.0, np.where(positive_N, -z_N, z_N)).sum()),
            group_weight=weight,
            group_auc=auc,
            positives_C=np.bincount(bins_N[positive_N], minlength=BINS),
            negatives_C=np.bincount(bins_N[~positive_N], minlength=BINS),
        )

    def __add__(self, other: MetricState) -> MetricState:
        """The state of both's examples together."""
        return MetricState(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def figures(self) -> dict[str, float | None]:
        """ne, auc, gauc, log_loss, calibration, label_rate, examples; None where undefined (no
        examples, one class)."""
        rate = self.labels / self.examples if self.examples else None
        log_loss = self.log_loss / self.examples if self.examples else None
        base = entropy(rate) if rate is not None else 0.0
        return {
            "ne": log_loss / base if log_loss is not None and base else None,
            "auc": _auc(self.positives_C, self.negatives_C),
            "gauc": self.group_auc / self.group_weight if self.group_weight else None,
            "log_loss": log_loss,
            "calibration": self.predictions / self.labels if self.labels else None,
            "label_rate": rate,
            "examples": self.examples,
        }

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Arrays for `np.savez` or a checkpoint; of the bins only those with examples."""
        used = np.flatnonzero(self.positives_C + self.negatives_C)
        return {
            "examples": np.array(self.examples, np.int64),
            "sums": np.array(
                [self.labels, self.predictions, self.log_loss, self.group_weight, self.group_auc],
                np.float64,
            ),
            "bins": np.stack([used, self.positives_C[used], self.negatives_C[used]]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The state that `to_arrays` wrote, exactly."""
        labels, predictions, log_loss, group_weight, group_auc = (
            float(value) for value in arrays["sums"]
        )
        used, *counts = arrays["bins"]
        positives_C = _no_counts()
        negatives_C = _no_counts()
        positives_C[used], negatives_C[used] = counts
        return cls(
            int(arrays["examples"]),
            labels,
            predictions,
            log_loss,
            group_weight,
            group_auc,
            positives_C,
            negatives_C,
        )


def entropy(rate: float) -> float:
    """Entropy in nats of a label of this rate; 0 where the rate is 0 or 1."""
    return float(-rate * np.log(rate) - (1 - rate) * np.log1p(-rate)) if 0 < rate < 1 else 0.0


def _bins(z_N: Floats) -> Counts:
    position_N = (z_N + LOGIT_RANGE) * (BINS / (2 * LOGIT_RANGE))
    return np.clip(position_N, 0, BINS - 1).astype(np.int64)


def _auc(positives_C: Counts, negatives_C: Counts) -> float | None:
    """Share of pairs (positive, negative) in the right order, ties half; None without a pair.
    Floats: the counts' product overflows."""
    negatives = negatives_C.astype(np.float64)
    below = np.cumsum(negatives) - negatives
    pairs = float(positives_C.sum()) * float(negatives.sum())
    return float((positives_C * (below + negatives / 2)).sum() / pairs) if pairs else None


def _grouped_auc(
    z_N: Floats,
    positive_N: NDArray[np.bool_],
    groups_N: NDArray[Any],
) -> tuple[float, float]:
    """(sum of examples, sum of examples times AUC) over the groups with both classes; exact, by
    average ranks.

    The sum of the ranks R of a group's P positives among its n examples gives AUC = (R - P (P + 1)
    / 2) / (P (n - P)).
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
    new_tie_N = new_group_N | np.r_[True, z_N[1:] != z_N[:-1]]
    tie_first = np.flatnonzero(new_tie_N)
    tie_size = np.bincount(np.cumsum(new_tie_N) - 1)
    rank_N = np.repeat(tie_first + (tie_size + 1) / 2, tie_size) - first_G[group_N]
    rank_sum_G = np.bincount(group_N, weights=rank_N * positive_N)
    positives_G = np.bincount(group_N, weights=positive_N)
    pairs_G = positives_G * (size_G - positives_G)
    both_G = pairs_G > 0
    auc_G = (rank_sum_G - positives_G * (positives_G + 1) / 2)[both_G] / pairs_G[both_G]
    return float(size_G[both_G].sum()), float((size_G[both_G] * auc_G).sum())
