"""Tables are dealt evenly, each to one worker or to all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from exfm_ray.planner.table_placement import place_tables

TABLES = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(2, 10**12), min_size=1)


@given(TABLES, st.integers(1, 9))
def test_no_worker_holds_much_more_than_another(tables: dict[str, int], workers: int) -> None:
    """Wrong: a table is lost, the order depends on the schema's, or one worker is given a table
    while another has fewer rows."""
    dealt = place_tables(tables, "table_wise", workers)
    assert dealt.keys() == tables.keys() and dealt == place_tables(
        dict(reversed(tables.items())), "table_wise", workers
    )
    held = [[tables[name] for name, worker in dealt.items() if worker == w] for w in range(workers)]
    assert sum(map(len, held)) == len(tables)
    for mine in held:
        for other in held:
            assert not mine or sum(mine) - min(mine) <= sum(
                other
            )  # the last that it was given, the smallest, came when it had least


@given(TABLES, st.integers(2, 9))
def test_row_wise_cuts_everything_where_there_is_something_to_cut(
    tables: dict[str, int], workers: int
) -> None:
    """Wrong: a table stays whole on one worker, or a single worker's tables are cut."""
    assert set(place_tables(tables, "row_wise", workers).values()) == {None}
    assert set(place_tables(tables, "row_wise", 1).values()) == {0}
