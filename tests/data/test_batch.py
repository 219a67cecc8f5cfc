"""Packed rows as tensors, and rows regrouped into batches."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from example import SCHEMA, make_rows
from hypothesis import given
from hypothesis import strategies as st

from exfm_ray.data.batch import to_batch
from exfm_ray.data.rebatch import Rebatcher
from exfm_ray.data.stream import EventStream
from exfm_ray.training.train_batch import pad


@pytest.mark.parametrize(("start", "rows"), [(0, 50), (7, 20), (49, 1), (10, 0)])
def test_tensors_equal_the_rows(start: int, rows: int) -> None:
    """Wrong: the offset of a slice or of a chunk is forgotten, and rows get others' values."""
    whole = make_rows(50, seed=2)
    chunked = pa.concat_tables([whole.slice(0, 13), whole.slice(13, 20), whole.slice(33)])
    expected = whole.slice(start, rows).to_pylist()
    for table in (whole, chunked, pa.concat_tables([whole.slice(50), whole])):
        batch = to_batch(table.slice(start, rows), SCHEMA)
        assert len(batch) == rows
        assert batch.sparse_BS.tolist() == [row["sparse"] for row in expected]
        np.testing.assert_array_equal(
            batch.dense_BD,
            np.array([row["dense"] for row in expected], np.float32).reshape(rows, 2),
        )
        assert batch.labels_BT.tolist() == [row["labels"] for row in expected]
        values = batch.bag_values_V.tolist()
        for lengths, bag in zip(batch.bag_lengths_MB.tolist(), SCHEMA.bags, strict=True):
            for length, row in zip(lengths, expected, strict=True):
                assert values[:length] == row[bag.name]
                values = values[length:]
        assert not values


def test_does_not_write_to_the_rows() -> None:
    """Wrong: a batch shares memory that others read: an in-place operation would change the data
    set."""
    table = make_rows(5, seed=1)
    before = table.to_pydict()
    batch = to_batch(table, SCHEMA)
    for tensor in vars(batch).values():
        tensor.zero_()
    assert table.to_pydict() == before


def test_padding_adds_rows_of_missing_values() -> None:
    """Wrong: padded rows look like examples, or change the values of real ones."""
    batch = to_batch(make_rows(5, seed=1), SCHEMA)
    padded = pad(batch, 8)
    assert pad(batch, 5) is batch and len(padded) == 8
    torch.testing.assert_close(padded.sparse_BS[:5], batch.sparse_BS)
    assert (
        not padded.sparse_BS[5:].any()
        and not padded.bag_lengths_MB[:, 5:].any()
        and not padded.labels_BT[5:].any()
    )
    torch.testing.assert_close(padded.bag_values_V, batch.bag_values_V)


@given(sizes=st.lists(st.integers(0, 20), max_size=12), rows=st.integers(1, 9))
def test_regroup_keeps_rows_and_order(sizes: list[int], rows: int) -> None:
    """Wrong: a batch has another size than requested, or rows are lost or swapped between
    tables."""
    regroup = Rebatcher(rows)
    start = 0
    pieces = []
    for size in sizes:
        pieces += list(regroup.add(pa.table({"id": np.arange(start, start + size)})))
        start += size
    assert all(piece.num_rows == rows for piece in pieces)
    rest = list(regroup.flush())
    assert len(rest) <= 1 and all(0 < piece.num_rows < rows for piece in rest)
    assert [i for piece in pieces + rest for i in piece["id"].to_pylist()] == list(range(start))
    assert not list(regroup.flush())


@pytest.mark.parametrize("size", [1, 7, 400, 1000])
def test_split_gives_the_rows_in_order(stream: EventStream, size: int) -> None:
    """Wrong: the DAS scores rows with the keywords or clicked ads of other rows."""
    table = stream.read(0, stream.window(0).fragments[0])
    pieces = list(to_batch(table, stream.schema).split(size))
    assert [len(p) for p in pieces] == [min(size, 400 - start) for start in range(0, 400, size)]
    for i, piece in enumerate(pieces):
        expected = to_batch(table.slice(i * size, size), stream.schema)
        for name, tensor in vars(expected).items():
            assert torch.equal(getattr(piece, name), tensor), name
