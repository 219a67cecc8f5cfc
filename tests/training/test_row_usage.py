"""When table rows were last used, compared with plain sets."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from example import SCHEMA, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from exfm_ray.data.stream import list_values
from exfm_ray.training.row_usage import RowLastUse

Ids = set[tuple[str, int]]


def used(rows: pa.Table) -> Ids:
    """(table, row) of each row that the examples read, one value at a time."""
    ids_NS = list_values(rows["sparse"], len(SCHEMA.single))
    found = {(f.table or f.name, int(v)) for s, f in enumerate(SCHEMA.single) for v in ids_NS[:, s]}
    return found | {
        (f.table or f.name, v)
        for f in SCHEMA.bags
        for values in rows[f.name].to_pylist()
        for v in values
    }


def fragments(seed: int, sizes: list[int]) -> list[pa.Table]:
    """The fragments of a window: slices of filtered tables, as in the loop."""
    rows = make_rows(sum(sizes) + 5, seed)
    begins = np.cumsum([5, *sizes])
    return [
        rows.slice(begin, size).filter(pa.array(np.arange(size) % 3 > 0))
        for begin, size in zip(begins, sizes, strict=False)
    ]


def flat(stale: dict[str, np.ndarray]) -> Ids:
    """The rows as a set; asserts that they are unique and ascending."""
    for rows in stale.values():
        assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()
    return {(table, int(row)) for table, rows in stale.items() for row in rows}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 12), max_size=3), max_size=8),
    st.integers(1, 3),
    st.integers(0, 99),
    st.integers(0, 8),
)
def test_stale_rows_are_those_unused_for_the_given_windows(
    windows: list[list[int]],
    after: int,
    seed: int,
    saved: int,
) -> None:
    """Wrong: a row is reset too early, too late, twice or never; row 0 is reset; a follower's or a
    bag's use does not count; a window without examples counts; or saving and loading changes any of
    this."""
    usage = RowLastUse(SCHEMA, after)
    last: dict[tuple[str, int], int] = {}
    number = 0
    for position, sizes in enumerate(windows):
        tables = fragments(seed + position, sizes)
        now = set().union(*(used(table) for table in tables))
        for table in tables:
            usage.mark(table)
        last |= dict.fromkeys(now, number)
        expected = (
            {key for key, at in last.items() if number - at >= after and key[1] != 0}
            if now
            else set()
        )
        assert flat(usage.end_window()) == expected
        last = {key: at for key, at in last.items() if key not in expected}
        number += bool(now)
        if position == saved:
            state = usage.state()
            usage = RowLastUse(SCHEMA, after)
            usage.restore(state)


def test_windows_without_examples_reset_nothing() -> None:
    """Wrong: a model whose domain is silent for some windows loses all its rows."""
    usage = RowLastUse(SCHEMA, 1)
    usage.mark(make_rows(20, 0))
    assert usage.end_window() == {}
    usage.mark(make_rows(0, 0))
    assert usage.end_window() == usage.end_window() == {}
    usage.mark(make_rows(1, 1))
    assert usage.end_window().keys() == {"user", "ad", "hour", "keywords", "domain"}
