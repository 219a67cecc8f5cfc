"""The map between two snapshots' spaces: equal to least squares with pseudo-examples, whole where
examples are few."""

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
    """What two snapshots say of the same examples, float32 (N, 4)."""
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
    """Wrong: the map fits others than these examples, or how much it fits them depends on the unit
    that values are in."""
    old, new = examples(number, seed, scale)
    np.testing.assert_allclose(
        ridge_alignment(old, new), aligned_slowly(old, new), rtol=1e-7, atol=1e-7
    )  # normal equations square the condition


@given(number=st.integers(1, 3), seed=st.integers(0, 1000))
def test_what_no_example_tells_of_stays(number: int, seed: int) -> None:
    """Wrong: a window with fewer examples than dimensions takes the other dimensions away from
    every user, for good."""
    old, new = examples(number, seed)
    _, _, vt = np.linalg.svd(old.astype(np.float64))
    untold = vt[number:]
    np.testing.assert_allclose(untold @ ridge_alignment(old, new), untold, atol=1e-9)


@pytest.mark.parametrize("old", [np.empty((0, 4)), np.zeros((3, 4))], ids=["none", "zeros"])
def test_without_examples_all_stays(old: Array) -> None:
    """Wrong: a store turns into NaN, or to nothing, where there is nothing to map it by."""
    np.testing.assert_array_equal(
        ridge_alignment(old.astype(np.float32), np.zeros(old.shape, np.float32)), np.eye(4)
    )


def test_many_examples_decide() -> None:
    """Wrong: the identity has a say where a window has examples enough."""
    old, new = examples(20_000, 0)
    least = np.linalg.lstsq(old.astype(np.float64), new.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(ridge_alignment(old, new), least, atol=3 / 20_000)


@pytest.mark.parametrize("last", [0, 2])
def test_arrays_are_the_store(last: int) -> None:
    """Wrong: a store is another one when it is read again."""
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
