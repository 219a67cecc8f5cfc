"""Tables are placed evenly, each on one worker or on all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from exfm_ray.planner.table_placement import place_tables

TABLES = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(2, 10**12), min_size=1)


@given(TABLES, st.integers(1, 9))
def test_no_worker_holds_much_more_than_another(tables: dict[str, int], workers: int) -> None:
    """Wrong: a table is lost, the placement depends on the schema's order, or a worker gets a
    table while another has fewer rows."""
    placement = place_tables(tables, "table_wise", workers)
    reordered = dict(reversed(tables.items()))
    assert placement.keys() == tables.keys()
    assert placement == place_tables(reordered, "table_wise", workers)

    rows_on: list[list[int]] = [[] for _ in range(workers)]
    for name, worker in placement.items():
        assert worker is not None
        rows_on[worker].append(tables[name])
    assert sum(map(len, rows_on)) == len(tables)
    for rows in rows_on:
        # A worker's smallest table was its last. Before, the worker had the fewest rows.
        before_last = sum(rows) - min(rows, default=0)
        assert all(before_last <= sum(other) for other in rows_on)


@given(TABLES, st.integers(2, 9))
def test_row_wise_splits_every_table_over_several_workers(
    tables: dict[str, int], workers: int
) -> None:
    """Wrong: a table stays whole on one of several workers, or a single worker's tables are
    split."""
    assert set(place_tables(tables, "row_wise", workers).values()) == {None}
    assert set(place_tables(tables, "row_wise", 1).values()) == {0}
