"""The map between two snapshots' spaces equals least squares with pseudo-examples, also for few
examples."""

from __future__ import annotations

import numpy as np
import pytest
from alignment import aligned_slowly
from hypothesis import given
from hypothesis import strategies as st

from exfm_ray.stores.feature_store import Array, FeatureStore, ridge_alignment


def examples(
    number: int,
    seed: int,
    scale: float = 1.0,
) -> tuple[Array, Array]:
    """Return what two snapshots say about the same examples, float32 (N, 4) each."""
    rng = np.random.default_rng(seed)
    old = scale * rng.normal(size=(number, 4))
    new = old @ (np.eye(4) + 0.5 * rng.normal(size=(4, 4))) + 0.1 * scale * rng.normal(
        size=old.shape
    )
    return old.astype(np.float32), new.astype(np.float32)


@given(
    number=st.integers(1, 40), seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 1.0, 1e3])
)
def test_the_map_is_least_squares_with_pseudo_examples(
    number: int,
    seed: int,
    scale: float,
) -> None:
    """Wrong: the map fits other examples, or how well it fits depends on the unit of the values."""
    old, new = examples(number, seed, scale)
    np.testing.assert_allclose(
        ridge_alignment(old, new), aligned_slowly(old, new), rtol=1e-7, atol=1e-7
    )  # normal equations square the condition


@given(number=st.integers(1, 3), seed=st.integers(0, 1000))
def test_directions_that_no_example_covers_stay(number: int, seed: int) -> None:
    """Wrong: a window with fewer examples than dimensions removes the other dimensions from every
    user, for good."""
    old, new = examples(number, seed)
    _, _, vt = np.linalg.svd(old.astype(np.float64))
    uncovered = vt[number:]
    np.testing.assert_allclose(uncovered @ ridge_alignment(old, new), uncovered, atol=1e-9)


@pytest.mark.parametrize("old", [np.empty((0, 4)), np.zeros((3, 4))], ids=["none", "zeros"])
def test_without_examples_all_stays(old: Array) -> None:
    """Wrong: a store turns into NaN, or to zero, if there is nothing to map it by."""
    np.testing.assert_array_equal(
        ridge_alignment(old.astype(np.float32), np.zeros(old.shape, np.float32)), np.eye(4)
    )


def test_many_examples_decide() -> None:
    """Wrong: the identity matters although a window has enough examples."""
    old, new = examples(20_000, 0)
    least = np.linalg.lstsq(old.astype(np.float64), new.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(ridge_alignment(old, new), least, atol=3 / 20_000)


@pytest.mark.parametrize("last", [0, 2])
def test_arrays_are_the_store(last: int) -> None:
    """Wrong: a store changes when it is written and read again."""
    empty = FeatureStore.empty(3, last)
    for store in (
        empty,
        empty.updated(np.array([5, 2, 5]), np.arange(9, dtype=np.float32).reshape(3, 3)),
    ):
        again = FeatureStore.from_arrays(
            {name: array for name, array in store.arrays().items() if array.size}, 3, last
        )
        for one, other in zip(vars(store).values(), vars(again).values(), strict=True):
            assert np.array_equal(one, other) and one.dtype == other.dtype
