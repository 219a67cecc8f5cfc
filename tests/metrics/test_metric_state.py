"""Figures against scikit-learn and torchmetrics, and the sums against each other."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import log_loss, roc_auc_score
from torchmetrics.functional.classification import binary_auroc

from exfm_ray.metrics.state import BINS, LOGIT_RANGE, MetricState


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z.astype(np.float64)))


def draw(
    size: int,
    seed: int = 0,
    groups: int = 50,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(-2, 1.5, size).astype(np.float32)
    labels = (rng.random(size) < sigmoid(logits + rng.normal(0, 1, size))).astype(np.float32)
    return logits, labels, rng.integers(0, groups, size)


def test_against_scikit_learn() -> None:
    """Wrong: a figure is not what its name says."""
    logits, labels, groups = draw(20_000)
    figures = MetricState.from_logits(logits, labels, groups).figures()
    p = sigmoid(logits)
    rate = labels.mean(dtype=np.float64)
    # Bins can misjudge only pairs that share one, and count half of each: at most half the share of
    # such pairs.
    bins = np.floor((logits.astype(np.float64) + LOGIT_RANGE) / (2 * LOGIT_RANGE) * BINS).astype(
        int
    )
    positives, negatives = (
        np.bincount(bins[labels == y], minlength=BINS).astype(float) for y in (1, 0)
    )
    bound = 0.5 * (positives @ negatives) / (positives.sum() * negatives.sum())
    assert bound < 2e-4
    assert figures["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=bound + 1e-12)
    assert figures["log_loss"] == pytest.approx(log_loss(labels, p), rel=1e-9)
    assert figures["ne"] == pytest.approx(
        log_loss(labels, p) / log_loss(labels, np.full(len(p), rate)), rel=1e-9
    )
    assert figures["calibration"] == pytest.approx(p.sum() / labels.sum(), rel=1e-12)
    assert figures["label_rate"] == pytest.approx(rate) and figures["examples"] == 20_000


def test_against_torchmetrics() -> None:
    """Wrong: AUC disagrees with a second, independent implementation."""
    logits, labels, _ = draw(5_000, seed=1)
    expected = binary_auroc(torch.from_numpy(logits), torch.from_numpy(labels).long())
    assert MetricState.from_logits(logits, labels).figures()["auc"] == pytest.approx(
        float(expected), abs=2e-4
    )


def test_grouped_auc_against_a_loop() -> None:
    """Wrong: ranks leak from one group into the next, ties or one-class groups are miscounted, or
    the weights are not examples."""
    logits, labels, groups = draw(3_000, seed=2, groups=400)
    logits = np.round(logits)  # many ties
    total = weight = 0.0
    for group in np.unique(groups):
        mask = groups == group
        if 0 < labels[mask].sum() < mask.sum():
            total += mask.sum() * roc_auc_score(labels[mask], logits[mask])
            weight += mask.sum()
    assert weight < len(labels), "the case must hold one-class groups"
    state = MetricState.from_logits(logits, labels, groups * 1_000_003 - 7)
    assert (state.group_weight, state.group_auc) == (weight, pytest.approx(total, rel=1e-12))
    assert state.figures()["gauc"] == pytest.approx(total / weight, rel=1e-12)


def test_by_hand() -> None:
    """Wrong: ties do not get half credit, or groups are not weighted by their examples."""
    logits = np.array([1.0, 1.0, 0.0, 3.0, 2.0])
    labels = np.array([1, 0, 0, 0, 1])
    groups = np.array([5, 5, 5, 8, 8])
    figures = MetricState.from_logits(logits, labels, groups).figures()
    assert figures["auc"] == pytest.approx(
        (0.5 + 1 + 0 + 1 + 1 + 0) / 6
    )  # 1 against 1, 0, 3; 2 against 1, 0, 3
    assert figures["gauc"] == pytest.approx((3 * 0.75 + 2 * 0.0) / 5)


examples = st.integers(0, 30).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.float32, n, elements=st.floats(-30, 30, width=32)),
        hnp.arrays(np.float32, n, elements=st.sampled_from([0.0, 1.0])),
        hnp.arrays(np.int64, n, elements=st.integers(0, 4)),
    )
)


@settings(max_examples=60, deadline=None)
@given(examples, examples)
def test_states_add_up(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> None:
    """Wrong: figures of a window depend on how it was cut into batches and workers."""
    summed = MetricState.from_logits(*a) + MetricState.from_logits(*b)
    whole = MetricState.from_logits(*(np.concatenate(parts) for parts in zip(a, b, strict=True)))
    for name, value in whole.figures().items():
        if name != "gauc":
            assert summed.figures()[name] == (
                None if value is None else pytest.approx(value, rel=1e-9, abs=1e-12)
            ), name
    assert np.array_equal(summed.positives_C, whole.positives_C) and np.array_equal(
        summed.negatives_C, whole.negatives_C
    )


@settings(max_examples=60, deadline=None)
@given(examples)
def test_figures_stay_in_their_bounds(a: tuple[np.ndarray, ...]) -> None:
    """Wrong: a corner case (one class, one group, equal or extreme logits) gives NaN or an
    impossible figure."""
    figures = MetricState.from_logits(*a).figures()
    assert all(v is None or np.isfinite(v) for v in figures.values())
    for name in ("auc", "gauc", "label_rate"):
        assert figures[name] is None or 0 <= figures[name] <= 1
    mixed = 0 < a[1].sum() < len(a[1])
    assert (figures["auc"] is not None) == (figures["ne"] is not None) == mixed


def test_saved_and_read() -> None:
    """Wrong: a resumed run goes on from other sums than it stopped with."""
    state = MetricState.from_logits(*draw(1_000))
    file = io.BytesIO()
    np.savez(file, **state.to_arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        again = MetricState.from_arrays(arrays)
    for f in dataclasses.fields(state):
        assert np.array_equal(getattr(state, f.name), getattr(again, f.name)), f.name
    assert MetricState.from_arrays(MetricState().to_arrays()).figures() == MetricState().figures()


def test_empty_is_neutral_and_undefined() -> None:
    """Wrong: a window without examples of a domain breaks the report or shifts the totals."""
    figures = MetricState().figures()
    assert figures.pop("examples") == 0 and set(figures.values()) == {None}
    state = MetricState.from_logits(*draw(100))
    assert (MetricState() + state).figures() == state.figures()


def test_extreme_logits() -> None:
    """Wrong: a sure prediction gives log(0), and one example spoils the window."""
    figures = MetricState.from_logits(
        np.array([800.0, -800.0, 800.0], np.float32), np.array([1, 0, 0])
    ).figures()
    assert figures["log_loss"] == pytest.approx(800 / 3) and figures["auc"] == 0.75


def test_a_diverged_model_is_named() -> None:
    """Wrong: NaN logits are ranked as if they were numbers, or an infinite one gives figures that
    JSON has no words for."""
    for logit in (np.nan, np.inf, -np.inf):
        with pytest.raises(
            ValueError, match="1 of 2 logits are not finite: the model has diverged"
        ):
            MetricState.from_logits(np.array([logit, 0.0]), np.array([1, 0]))
