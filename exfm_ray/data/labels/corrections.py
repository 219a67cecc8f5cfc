"""Corrections: examples whose label came too late for their own window. They are learned once more,
among the examples of a later window.

Which examples a window brings again, and for which task, lies on disk (`CORRECTIONS`, see
`data.labels.releases`). The corrections of a task are dealt to the window's fragments in proportion
to the fragments' rows, in the order of the stream, and stand at equal distances within each
fragment. So they are spread over the window, every earlier fragment is read about once, and the
contents of a batch follow from the stream alone.

Shapes: C corrections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exfm_ray.data.labels.releases import attribution, release, with_labels
from exfm_ray.data.stream import EventStream, Fragment, list_values
from exfm_ray.errors import UserError
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import parquet_source
from exfm_ray.storage.remote import AnyPath

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
"""The label of a correction: a 1, for an example that was learned as a 0."""

Read = Callable[[int, Fragment], pa.Table | None]
"""Reads an earlier window's fragment. None leaves out the fragment's examples."""


def correction_fragments(
    stream: EventStream,
    window: int,
    tasks: Sequence[str],
) -> list[Fragment]:
    """The correction files that a released window delivers: at most one for each task."""
    fragments = []
    for task in tasks:
        if task not in attribution(stream.root):
            continue
        manifest = release(stream, window, task)
        if manifest.corrections:
            fragments.append(manifest.corrections)
    return fragments


def learned_fragments(
    stream: EventStream,
    window: int,
    tasks: Sequence[str],
    domains: Sequence[int] | None = None,
) -> list[Fragment]:
    """The fragments that a pass reads to learn, in order.

    These are the fragments that hold a row of `domains` (None: of any domain). If corrections are
    mixed among the rows, these are all fragments of the window; if the window has no events, the
    correction files themselves.
    """

    def has_domain(fragment: Fragment) -> bool:
        if domains is None:
            return True
        rows = [fragment.domain_rows[domain] for domain in domains]
        return any(rows)

    fragments = stream.window(window).fragments
    corrections = correction_fragments(stream, window, tasks)
    late = [fragment for fragment in corrections if has_domain(fragment)]
    if late:
        return list(fragments or late)
    return [fragment for fragment in fragments if has_domain(fragment)]


def with_corrections(
    stream: EventStream,
    window: int,
    fragment: Fragment,
    tasks: Sequence[str],
    read_events: Callable[[], pa.Table],
    read: Read,
) -> pa.Table:
    """The rows that are learned from one of `learned_fragments`.

    Args:
        stream: the event stream.
        window: index of the window.
        fragment: one of `learned_fragments`.
        tasks: tasks that are learned.
        read_events: reads the fragment's rows.
        read: reads earlier windows' fragments, with the columns of `read_events()`.

    Returns:
        The fragment's rows, with its part of the window's corrections mixed among them.
    """
    if fragment.file.startswith(CORRECTIONS):
        return _corrections(stream, window, fragment, 0.0, 1.0, read)
    events = read_events()
    start, end = _row_range(stream, window, fragment)
    parts = [events]
    for late in correction_fragments(stream, window, tasks):
        rows = _corrections(stream, window, late, start, end, read)
        if rows.num_rows:
            parts.append(rows)
    if len(parts) == 1:
        return events
    return _interleave(parts)


def _row_range(
    stream: EventStream,
    window: int,
    fragment: Fragment,
) -> tuple[float, float]:
    """The rows of a fragment as a range [start, end) of its window, which is [0, 1)."""
    manifest = stream.window(window)
    position = manifest.fragments.index(fragment)
    earlier = manifest.fragments[:position]
    first_row = sum(other.rows for other in earlier)
    last_row = first_row + fragment.rows
    start = first_row / manifest.rows
    end = last_row / manifest.rows
    return start, end


def _interleave(parts: Sequence[pa.Table]) -> pa.Table:
    """Mix tables so that the rows of each stand at equal distances."""
    places = []
    for part in parts:
        rows = part.num_rows
        places.append((np.arange(rows) + 0.5) / rows)
    mixed = np.argsort(np.concatenate(places), kind="stable")
    joined = pa.concat_tables(parts).combine_chunks()
    return joined.take(pa.array(mixed))


def without_corrections(rows: pa.Table) -> pa.Table:
    """The rows that are events of the window itself."""
    tasks = rows.schema.field("labels").type.list_size
    labels_NT = list_values(rows["labels"], tasks)
    corrected_N = (labels_NT == CORRECTED).any(axis=1)
    if not corrected_N.any():
        return rows
    return rows.filter(pa.array(~corrected_N))


def _corrections(
    stream: EventStream,
    window: int,
    fragment: Fragment,
    start: float,
    end: float,
    read: Read,
) -> pa.Table:
    """The examples that the range [start, end) of a correction file points to.

    Their label of the file's task is `CORRECTED`. All other labels are NaN, because they were
    learned already or are not known.
    """
    task = fragment.file.removeprefix(CORRECTIONS).removesuffix(".parquet")
    path = stream.path(window, fragment)
    positions = _read_positions(path, fragment)
    first = round(start * fragment.rows)
    last = round(end * fragment.rows)
    selected = positions.slice(first, last - first)

    tables = []
    for origin, number, in_fragment in _by_fragment(selected):
        origin_fragment = stream.window(origin).fragments[number]
        events = read(origin, origin_fragment)
        if events is None:
            continue
        rows = events.take(in_fragment["row"].combine_chunks())
        if not rows["example_id"].equals(in_fragment["example_id"]):
            raise UserError(
                f"{path}: points to other examples than window {origin} holds; "
                "prepare the stream again"
            )
        tables.append(rows)
    if not tables:
        return stream.schema.arrow_schema.empty_table()
    return _corrected(pa.concat_tables(tables), stream.schema, task)


def _read_positions(path: AnyPath, fragment: Fragment) -> pa.Table:
    source = parquet_source(path)
    positions = pq.read_table(source, partitioning=None, use_threads=False)
    rows = positions.num_rows
    if positions.schema != CORRECTION or rows != fragment.rows:
        columns = positions.column_names
        raise UserError(
            f"{path}: {rows} rows of {columns} where the manifest says {fragment.rows}; "
            "prepare the stream again"
        )
    return positions


def _by_fragment(positions: pa.Table) -> Iterator[tuple[int, int, pa.Table]]:
    """Window, number of the fragment, and the positions in that fragment."""
    window_C = positions["window"].to_numpy()
    number_C = positions["fragment"].to_numpy()
    origin_C = np.stack([window_C, number_C], axis=1)
    for window, number in np.unique(origin_C, axis=0).tolist():
        selected_C = (origin_C == (window, number)).all(axis=1)
        yield window, number, positions.filter(pa.array(selected_C))


def _corrected(
    rows: pa.Table,
    schema: Schema,
    task: str,
) -> pa.Table:
    shape = (rows.num_rows, len(schema.tasks))
    labels_NT = np.full(shape, np.nan, np.float32)
    column = schema.task_index(task)
    labels_NT[:, column] = CORRECTED
    return with_labels(rows.combine_chunks(), labels_NT)
