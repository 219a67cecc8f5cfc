"""Raw values to table rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exfm_ray.data.prepare.encode import (
    encode_bag,
    encode_dense,
    encode_domains,
    encode_labels,
    encode_values,
)
from exfm_ray.errors import UserError
from exfm_ray.schema import Encoding, Kind, Schema, SparseFeature

WORDS = st.lists(
    st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=8)), max_size=40
)
NUMBERS = st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), max_size=40)
HASHED_WORDS = [479534, 670495, 861548]
HASHED_NUMBERS = [661345, 325201, 464955]


@given(WORDS, NUMBERS, st.integers(2, 1000))
def test_hashed_rows_are_inside_the_table(
    words: list[str | None],
    numbers: list[int | None],
    rows: int,
) -> None:
    """Otherwise a lookup reads beyond its table, or a present value is taken for a missing one."""
    feature = SparseFeature(name="f", rows=rows)
    for values in (pa.array(words, pa.string()), pa.array(numbers, pa.int64())):
        out = encode_values(values, feature, "file")
        missing = values.is_null().to_numpy(zero_copy_only=False)
        assert (out[missing] == 0).all()
        assert ((out[~missing] >= 1) & (out[~missing] < rows)).all()


@given(WORDS, st.integers(0, 2**32))
def test_a_value_hashes_the_same_wherever_it_stands(words: list[str | None], seed: int) -> None:
    """Otherwise one user would have another embedding in every batch."""
    feature = SparseFeature(name="f", rows=10_000)
    order = np.random.default_rng(seed).permutation(len(words))
    whole = encode_values(pa.array(words, pa.string()), feature, "file")
    moved = encode_values(pa.array([words[i] for i in order], pa.string()), feature, "file")
    assert (whole[order] == moved).all()


def test_hashes_are_part_of_the_format() -> None:
    """Otherwise a new version of a library would silently detach a trained model from its
    tables."""
    feature = SparseFeature(name="f", rows=1_000_000)
    assert encode_values(pa.array(["a", "68fd1e64", "é"]), feature, "file").tolist() == HASHED_WORDS
    assert (
        encode_values(pa.array([0, 1, -5], pa.int32()), feature, "file").tolist() == HASHED_NUMBERS
    )


def test_tables_are_salted() -> None:
    """Otherwise two values that collide in one table collide in all of them."""
    values = pa.array(np.arange(2000))
    first, second = (
        encode_values(values, SparseFeature(name=n, rows=1000), "file") for n in ("a", "b")
    )
    assert (first == second).mean() < 0.01


def test_hash_spreads_evenly() -> None:
    """Otherwise some rows are crowded and others unused: 100,000 ids in 999 rows, chi-squared
    within 6 sigma of its mean."""
    counts = np.bincount(
        encode_values(pa.array(np.arange(100_000)), SparseFeature(name="f", rows=1000), "file"),
        minlength=1000,
    )[1:]
    expected = 100_000 / 999
    chi = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi - 998) < 6 * np.sqrt(2 * 998)


@pytest.mark.parametrize("value", [-1, 9, 2**40])
def test_index_refuses_what_its_table_does_not_hold(value: int) -> None:
    """Otherwise an id silently reads another id's row."""
    feature = SparseFeature(name="city", rows=10, encoding=Encoding.INDEX)
    with pytest.raises(UserError, match=rf"log\.csv.*'city'.*{value}.*raise `rows`"):
        encode_values(pa.array([0, 8, value]), feature, "log.csv")
    assert encode_values(pa.array([0, 8, None]), feature, "log.csv").tolist() == [1, 9, 0]


@given(
    st.lists(
        st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(0, 98)), max_size=9)),
        max_size=30,
    ),
    st.integers(1, 5),
    st.integers(0, 5),
)
def test_bags_keep_the_last_values(
    lists: list[list[int | None] | None],
    most: int,
    skip: int,
) -> None:
    """Otherwise a sequence loses its most recent items, or a slice of a column reads its
    neighbour's values."""
    feature = SparseFeature(
        name="tags", kind=Kind.MULTI, encoding=Encoding.INDEX, rows=100, max_length=most
    )
    out = encode_bag(pa.array(lists, pa.list_(pa.int64())).slice(skip), feature, "file")
    assert out.to_pylist() == [
        [v + 1 for v in (one or []) if v is not None][-most:] for one in lists[skip:]
    ]


@pytest.mark.parametrize("bad", [2.0, 0.5, None, -1.0, float("nan")])
def test_labels_are_zero_or_one(bad: float | None) -> None:
    """Otherwise the loss and NE are of something that is no probability."""
    with pytest.raises(UserError, match=r"log\.csv.*'click'.*must be 0 or 1"):
        encode_labels(pa.array([0.0, 1.0, bad]), "click", "log.csv")


def test_unknown_domain_names_the_nearest() -> None:
    """Otherwise an event goes to a surface that it was not shown on."""
    schema = Schema(features=(), tasks=("click",), domains=("feed", "search"))
    with pytest.raises(UserError, match=r"'serch'.*Did you mean 'search'"):
        encode_domains(pa.array(["feed", "serch"]), schema, "log.csv")
    assert encode_domains(pa.array(["search", "feed"]), schema, "log.csv").tolist() == [1, 0]


def test_dense_marks_missing_and_compresses_counts() -> None:
    """Otherwise one infinite or missing count poisons the running mean."""
    out = encode_dense(
        pa.array([0.0, np.e - 1, 1 - np.e, None, np.inf, np.nan]), "log1p", "count", "file"
    )
    assert np.allclose(out[:3], [0, 1, -1])
    assert np.isnan(out[3:]).all()
