"""Streams on disk: written whole, read as written, damage and foreign files named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example import SCHEMA, make_rows, make_stream

from exfm_ray.data.stream import EventStream, StreamWriter, window_name
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import read_json, write_json


def rows_of(stream: EventStream, window: int) -> pa.Table:
    return pa.concat_tables(
        [stream.read(window, fragment) for fragment in stream.window(window).fragments]
    )


@pytest.mark.parametrize("pieces", [[1000], [1] * 5 + [995], [399, 1, 1, 599], [800, 0, 200]])
def test_reads_what_was_written(tmp_path: Path, pieces: list[int]) -> None:
    """Wrong: rows are lost, changed or out of order, or fragments depend on the pieces in which the
    rows came."""
    table = make_rows(1000, seed=1)
    start = 0
    tables = []
    for size in pieces:
        tables.append(table.slice(start, size))
        start += size
    writer = StreamWriter(tmp_path, SCHEMA, {}, fragment_rows=400)
    writer.write_window(0, 0, 1000, 3, tables)
    stream = EventStream.open(tmp_path)
    window = stream.window(0)
    assert [f.rows for f in window.fragments] == [400, 400, 200] and (
        window.rows,
        window.duplicates,
    ) == (1000, 3)
    assert rows_of(stream, 0).equals(
        table.select(SCHEMA.arrow_schema.names).cast(SCHEMA.arrow_schema)
    )
    domains = np.sum([f.domain_rows for f in window.fragments], axis=0)
    np.testing.assert_array_equal(domains, np.bincount(table["domain"].to_numpy(), minlength=3))


def test_a_window_without_manifest_is_not_there(stream: EventStream) -> None:
    """Wrong: a window that a kill left half-written is read (rule 5)."""
    (stream.root / window_name(1) / "manifest.json").unlink()
    assert stream.windows() == [0, 2]
    with pytest.raises(UserError, match="window 1 is not prepared"):
        stream.window(1)


def test_committed_windows_stay_as_they_are(stream: EventStream) -> None:
    """Wrong: preparing again rewrites what others read already."""
    before = {path: path.read_bytes() for path in stream.root.rglob("*.parquet")}
    writer = StreamWriter(stream.root, SCHEMA, {"made": "by the tests"}, 400)
    writer.write_window(1, 0, 1, 0, [make_rows(10, seed=9)])
    assert {path: path.read_bytes() for path in stream.root.rglob("*.parquet")} == before


def test_a_folder_with_another_stream_is_refused(stream: EventStream) -> None:
    """Wrong: windows of two settings are mixed in one stream."""
    before = {path: path.read_bytes() for path in stream.root.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="other settings"):
        StreamWriter(stream.root, SCHEMA, {"made": "otherwise"}, 400)
    assert {path: path.read_bytes() for path in stream.root.rglob("*") if path.is_file()} == before


def replace(column: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(
        table.column_names.index(column), table.schema.field(column), value(table)
    )


def ids(
    row: int,
    feature: int,
    value: int,
) -> Callable[[pa.Table], pa.Array]:
    def change(table: pa.Table) -> pa.Array:
        flat = table["sparse"].combine_chunks().flatten().to_numpy().copy()
        flat[row * len(SCHEMA.single) + feature] = value
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), len(SCHEMA.single))

    return change


DAMAGE: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "rows": (lambda table: table.slice(1), "399 rows where the manifest says 400"),
    "type": (
        lambda table: table.set_column(0, "example_id", table["example_id"].cast(pa.int32())),
        "column 'example_id' is int32",
    ),
    "id too large": (
        replace("sparse", ids(3, 1, 51)),
        "feature 'ad' has id 51, outside its table of 51 rows",
    ),
    "id negative": (
        replace("sparse", ids(3, 0, -1)),
        "feature 'user' has id -1, outside its table of 101 rows",
    ),
    "bag": (
        replace("keywords", lambda table: pa.array([[20]] * len(table), pa.list_(pa.int32()))),
        "feature 'keywords' has id 20, outside",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_refuses_fragments_that_do_not_fit(stream: EventStream, name: str) -> None:
    """Wrong: an id outside its table reads foreign memory in the kernels, or rows shift against
    their supervision."""
    change, message = DAMAGE[name]
    fragment = stream.window(0).fragments[0]
    path = stream.path(0, fragment)
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)
    with pytest.raises(UserError) as caught:
        stream.read(0, fragment.model_copy(update={"bytes": path.stat().st_size}))
    assert f"{path}: {message}" in str(caught.value)


def test_refuses_missing_torn_and_foreign_files(stream: EventStream) -> None:
    """Wrong: damage on disk looks like a fault of the program, or a manifest can point outside its
    folder."""
    first, second, third = stream.window(0).fragments
    stream.path(0, first).unlink()
    stream.path(0, second).write_bytes(b"x" * second.bytes)
    stream.path(0, third).write_bytes(b"x")
    for fragment, message in (
        (first, "it is not there"),
        (second, "not a readable Parquet file"),
        (third, "1 bytes where the manifest says"),
    ):
        with pytest.raises(UserError, match=rf"{fragment.file}: .*{message}"):
            stream.read(0, fragment)
    with pytest.raises(UserError, match="not a plain file name"):
        stream.read(0, first.model_copy(update={"file": "../../secret"}))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("schema.json", "{", "schema.json: not valid JSON"),
        ("schema.json", '{"features": []}', "schema.json: not a schema"),
        ("window=000/manifest.json", "[]", "manifest.json: not a window manifest"),
        ("window=000/manifest.json", "", "manifest.json: not valid JSON"),
    ],
)
def test_refuses_damaged_manifests(
    stream: EventStream,
    file: str,
    content: str,
    message: str,
) -> None:
    """Wrong: a damaged manifest ends in a traceback."""
    (stream.root / file).write_text(content)
    with pytest.raises(UserError, match=message):
        EventStream.open(stream.root).window(0)


def test_refuses_a_window_of_another_schema(stream: EventStream, tmp_path: Path) -> None:
    """Wrong: windows copied from another stream are read with this one's schema."""
    path = stream.root / window_name(2) / "manifest.json"
    write_json(path, read_json(path) | {"schema_digest": "0"})
    with pytest.raises(UserError, match="prepared with another schema"):
        stream.window(2)
    with pytest.raises(UserError, match="no prepared stream here"):
        EventStream.open(tmp_path / "nowhere")


def test_windows_beyond_a_thousand_keep_their_order(tmp_path: Path) -> None:
    """Wrong: windows are sorted as text, and 1000 comes before 999."""
    writer = StreamWriter(tmp_path, SCHEMA, {}, 10)
    for window in (1000, 2, 999):
        writer.write_window(window, 0, 1, 0, [])
    assert EventStream.open(tmp_path).windows() == [2, 999, 1000]


def test_an_empty_stream_reads(tmp_path: Path) -> None:
    """Wrong: windows without rows cannot be written or read."""
    stream = make_stream(tmp_path, windows=2, rows=0)
    assert stream.complete and stream.windows() == [0, 1] and stream.window(1).rows == 0
