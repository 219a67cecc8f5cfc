"""Labels that came too late for their own window: their examples are learnt once more, among those
of a later window.

Which examples a window brings again, and for which task, lies on disk (`CORRECTIONS`, see
`data.labels`). Each task's are dealt to the window's fragments by the fragments' rows, in the order
of the stream, and stand in each at equal distances. So they are spread over the window, every
earlier fragment is read about once, and what a batch holds follows from the stream alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exfm_ray.data.labels.releases import attribution, release, with_labels
from exfm_ray.data.stream import EventStream, Fragment, list_values
from exfm_ray.errors import UserError
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import parquet_source

CORRECTIONS = "corrections."
CORRECTION = pa.schema(
    [
        ("example_id", pa.int64()),
        ("window", pa.int32()),
        ("fragment", pa.int32()),
        ("row", pa.int32()),
    ]
)
CORRECTED = 2.0
"""The label of a correction: a 1, for an example that was learnt as a 0."""

Read = Callable[[int, Fragment], pa.Table | None]
"""Gives an earlier window's fragment; None where its examples are to be left out."""


def correction_fragments(
    stream: EventStream,
    window: int,
    tasks: Sequence[str],
) -> list[Fragment]:
    """What a released window delivers of labels that came too late for their own: for each task a
    file of places, if any."""
    found = [
        release(stream, window, task).corrections
        for task in tasks
        if task in attribution(stream.root)
    ]
    return [fragment for fragment in found if fragment]


def learnt_fragments(
    stream: EventStream,
    window: int,
    tasks: Sequence[str],
    domains: Sequence[int] | None = None,
) -> list[Fragment]:
    """What a pass that learns reads, in order: fragments that hold a row of `domains` (None: of
    any); all of them where corrections are to be mixed among them. The corrections themselves where
    the window has no events."""

    def wanted(fragment: Fragment) -> bool:
        return domains is None or any(fragment.domain_rows[d] for d in domains)

    fragments = stream.window(window).fragments
    late = [
        fragment for fragment in correction_fragments(stream, window, tasks) if wanted(fragment)
    ]
    return (
        [*(fragments or late)] if late else [fragment for fragment in fragments if wanted(fragment)]
    )


def with_corrections(
    stream: EventStream,
    window: int,
    fragment: Fragment,
    tasks: Sequence[str],
    own: Callable[[], pa.Table],
    read: Read,
) -> pa.Table:
    """The rows that are learnt of one of `learnt_fragments`: `own()`, its own ones, and its part of
    the window's corrections among them.

    `read` gives earlier windows' fragments, with the columns of `own()`.
    """
    if fragment.file.startswith(CORRECTIONS):
        return _rows(stream, window, fragment, 0.0, 1.0, read)
    events = own()
    manifest = stream.window(window)
    before = sum(f.rows for f in manifest.fragments[: manifest.fragments.index(fragment)])
    share = before / manifest.rows, (before + fragment.rows) / manifest.rows
    late = [
        _rows(stream, window, places, *share, read)
        for places in correction_fragments(stream, window, tasks)
    ]
    parts = [events, *(rows for rows in late if rows.num_rows)]
    if len(parts) == 1:
        return events
    places_N = np.concatenate([(np.arange(part.num_rows) + 0.5) / part.num_rows for part in parts])
    return (
        pa.concat_tables(parts).combine_chunks().take(pa.array(np.argsort(places_N, kind="stable")))
    )


def without_corrections(rows: pa.Table) -> pa.Table:
    """The rows that are a window's own."""
    again_N = (
        list_values(rows["labels"], rows.schema.field("labels").type.list_size) == CORRECTED
    ).any(axis=1)
    return rows.filter(pa.array(~again_N)) if again_N.any() else rows


def _rows(
    stream: EventStream,
    window: int,
    fragment: Fragment,
    start: float,
    end: float,
    read: Read,
) -> pa.Table:
    """The examples that the share [start, end) of a correction fragment points to.

    Their label of the fragment's task is `CORRECTED`, all others NaN: learnt once already, or not
    known.
    """
    task = fragment.file.removeprefix(CORRECTIONS).removesuffix(".parquet")
    path = stream.path(window, fragment)
    places = pq.read_table(parquet_source(path), partitioning=None, use_threads=False)
    if places.schema != CORRECTION or places.num_rows != fragment.rows:
        raise UserError(
            f"{path}: {places.num_rows} rows of {places.column_names} where the manifest says {fragment.rows}; prepare the stream again"
        )
    first = round(start * fragment.rows)
    last = round(end * fragment.rows)
    places = places.slice(first, last - first)
    origin_C = np.stack([places["window"].to_numpy(), places["fragment"].to_numpy()], axis=1)
    found = []
    for origin, number in np.unique(origin_C, axis=0).tolist():
        here = places.filter(pa.array((origin_C == (origin, number)).all(axis=1)))
        events = read(origin, stream.window(origin).fragments[number])
        if events is not None:
            rows = events.take(here["row"].combine_chunks())
            if not rows["example_id"].equals(here["example_id"]):
                raise UserError(
                    f"{path}: points to other examples than window {origin} holds; prepare the stream again"
                )
            found.append(rows)
    return (
        _corrected(pa.concat_tables(found), stream.schema, task)
        if found
        else stream.schema.arrow_schema.empty_table()
    )


def _corrected(
    rows: pa.Table,
    schema: Schema,
    task: str,
) -> pa.Table:
    labels_NT = np.full((rows.num_rows, len(schema.tasks)), np.nan, np.float32)
    labels_NT[:, schema.task_index(task)] = CORRECTED
    return with_labels(rows.combine_chunks(), labels_NT)
