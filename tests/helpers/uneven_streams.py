"""Streams with windows of different sizes."""

from __future__ import annotations

from pathlib import Path

from example import SCHEMA, make_rows

from exfm_ray.data.stream import EventStream, StreamWriter

WINDOWS = 5
STREAMS = {
    "even": (300,) * WINDOWS,
    "empty window": (300, 300, 0, 300, 300),
    "two examples": (300, 300, 2, 300, 300),
}


def uneven_stream(folder: Path, rows: tuple[int, ...]) -> EventStream:
    """Write and open a stream with the given number of rows in each window."""
    writer = StreamWriter(folder, SCHEMA, {"made": "by the tests"}, 120)
    for window, count in enumerate(rows):
        first = sum(rows[:window])
        writer.write_window(
            window,
            first,
            first + count,
            0,
            [make_rows(count, seed=window, first_id=first)] if count else [],
        )
    writer.finish({})
    return EventStream.open(folder)
