"""Which worker holds which embedding table: the engine deals them so, and a plan says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal


def place_tables(
    tables: Mapping[str, int],
    sharding: Literal["row_wise", "table_wise"],
    workers: int,
) -> dict[str, int | None]:
    """The worker that holds each table whole, None where the table is cut over all of them; the
    largest first, ties by name.

    Row-wise, each table is cut, but for one worker, which has nothing to cut: whole tables cost it
    a third of the time. Table-wise, the largest table goes to the worker with the fewest rows so
    far, the first of several.

    Args:
        tables: name -> rows.
    """
    load = [0] * workers
    dealt: dict[str, int | None] = {}
    for table, rows in sorted(tables.items(), key=lambda item: (-item[1], item[0])):
        if sharding == "row_wise" and workers > 1:
            dealt[table] = None
        else:
            worker = load.index(min(load))
            load[worker] += rows
            dealt[table] = worker
    return dealt
