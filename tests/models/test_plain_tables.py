"""Plain tables against one nn.EmbeddingBag per feature; initial tables whichever way they are
cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from exfm_ray.config.models import MLPConfig
from exfm_ray.data.batch import Batch
from exfm_ray.models import embeddings
from exfm_ray.models.embeddings import INIT_STD, LocalTables, initial_rows, initial_table
from exfm_ray.schema import Kind, Schema, SparseFeature

SCHEMA = Schema(
    features=(
        SparseFeature(name="genres", kind=Kind.MULTI, rows=5, max_length=3),
        SparseFeature(name="user", rows=11),
        SparseFeature(name="item", rows=7),
        SparseFeature(name="clicked", kind=Kind.SEQUENCE, rows=7, table="item", max_length=4),
    ),
    tasks=("click",),
    domains=("a", "b"),
)


CONFIG = MLPConfig(dim=4)


def make_batch(size: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths_MB = torch.stack(
        [torch.randint(0, f.max_length + 1, (size,), generator=generator) for f in SCHEMA.bags]
    )
    values = [
        torch.randint(0, f.rows, (int(n.sum()),), generator=generator)
        for f, n in zip(SCHEMA.bags, lengths_MB, strict=True)
    ]
    sparse = [torch.randint(0, f.rows, (size,), generator=generator) for f in SCHEMA.single]
    return Batch(
        torch.stack(sparse, 1),
        torch.cat(values),
        lengths_MB,
        torch.empty(size, 0),
        torch.zeros(size, 1),
    )


def per_feature(tables: dict[str, Tensor], batch: Batch) -> Tensor:
    rows = [
        nn.EmbeddingBag.from_pretrained(tables[f.table or f.name], mode="mean")(ids[:, None])
        for f, ids in zip(SCHEMA.single, batch.sparse_BS.T, strict=True)
    ]
    per_bag = batch.bag_values_V.split(batch.bag_lengths_MB.sum(1).tolist())
    for f, values, lengths in zip(SCHEMA.bags, per_bag, batch.bag_lengths_MB, strict=True):
        rows.append(
            nn.EmbeddingBag.from_pretrained(tables[f.table or f.name], mode="mean")(
                values, lengths.cumsum(0) - lengths
            )
        )
    return torch.stack(rows, 1)


@pytest.mark.parametrize("size", [0, 1, 64])
def test_equals_one_embedding_bag_per_feature(size: int) -> None:
    """Wrong: an offset points into another table, the order of the features differs, or a bag is
    not averaged."""
    tables = LocalTables(SCHEMA, CONFIG, seed=3)
    batch = make_batch(size)
    embedded = tables(batch)
    assert embedded.shape == (size, len(SCHEMA.single) + len(SCHEMA.bags), 4)
    if size:
        torch.testing.assert_close(embedded, per_feature(tables.tables(), batch))


def test_empty_bags_are_zero() -> None:
    """Wrong: a missing list takes a neighbour's values or NaN."""
    tables = LocalTables(SCHEMA, CONFIG, seed=3)
    batch = make_batch(3)
    nothing = torch.zeros(len(SCHEMA.bags), 3, dtype=torch.int64)
    assert not tables.embed(batch.sparse_BS, batch.bag_values_V[:0], nothing)[
        :, len(SCHEMA.single) :
    ].any()


def test_gradients_reach_the_rows_that_were_read_only() -> None:
    """Wrong: learning one id moves another."""
    tables = LocalTables(SCHEMA, CONFIG, seed=3)
    batch = make_batch(2)
    tables(batch).sum().backward()
    touched = {int(i) for i in tables.weight.grad.abs().sum(1).nonzero()}
    rows = {
        tables.first_row[f.table or f.name] + int(i)
        for f, ids in zip(SCHEMA.single, batch.sparse_BS.T, strict=True)
        for i in ids
    }
    for f, values in zip(
        SCHEMA.bags, batch.bag_values_V.split(batch.bag_lengths_MB.sum(1).tolist()), strict=True
    ):
        rows |= {tables.first_row[f.table or f.name] + int(i) for i in values}
    assert touched == rows


def test_tables_go_out_and_in() -> None:
    """Wrong: a snapshot's tables come back in other places."""
    full = LocalTables(SCHEMA, CONFIG, seed=3)
    empty = LocalTables(SCHEMA, CONFIG, seed=None)
    assert not empty.weight.any()
    assert {n: len(t) for n, t in full.tables().items()} == dict(SCHEMA.tables)
    empty.load_tables(full.tables())
    assert torch.equal(empty.weight, full.weight)


def test_tables_that_do_not_fit_are_refused_and_nothing_is_changed() -> None:
    """Wrong: part of another schema's tables is loaded before the mistake is found."""
    tables = LocalTables(SCHEMA, CONFIG, seed=None)
    good = LocalTables(SCHEMA, CONFIG, seed=1).tables()
    for bad, message in [
        ({n: t for n, t in good.items() if n != "item"}, "table 'item' is missing"),
        (
            good | {"item": torch.zeros(8, 4)},
            r"'item' has shape \(8, 4\), the schema and dim say \(7, 4\)",
        ),
        (good | {"ad": torch.zeros(8, 4)}, "'ad' is not one of this schema's"),
    ]:
        with pytest.raises(ValueError, match=message):
            tables.load_tables(bad)
        assert not tables.weight.any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.data())
def test_a_shard_makes_its_own_rows(rows: int, data: st.DataObject) -> None:
    """Wrong: the initial model depends on how its tables are sharded."""
    first = data.draw(st.integers(0, rows))
    last = data.draw(st.integers(first, rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "BLOCK_ROWS", 16)
        assert torch.equal(
            initial_table("t", rows, 3, 0)[first:last], initial_table("t", rows, 3, 0, first, last)
        )


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.data())
def test_some_rows_are_those_of_the_table(rows: int, data: st.DataObject) -> None:
    """Wrong: a row that is reset does not become what it was at first."""
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, rows - 1)))), np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "BLOCK_ROWS", 16)
        assert torch.equal(
            initial_rows("t", rows, 3, 5, chosen),
            initial_table("t", rows, 3, 5)[torch.from_numpy(chosen)],
        )


def test_initial_rows() -> None:
    """Wrong: tables or seeds share their rows, blocks repeat, or the scale is not the documented
    one."""
    rows = embeddings.BLOCK_ROWS + 100
    table = initial_table("t", rows, 4, 0)
    assert abs(table.std() / INIT_STD - 1) < 0.02 and table[0].any()
    assert len(table.unique(dim=0)) == rows
    assert torch.equal(table[-50:], initial_table("t", rows, 4, 0, rows - 50))
    for other in (initial_table("u", 10, 4, 0), initial_table("t", 10, 4, 1)):
        assert not torch.equal(initial_table("t", 10, 4, 0), other)
    with pytest.raises(ValueError, match="which has 10 rows"):
        initial_table("t", 10, 4, 0, 3, 11)


def test_exports_with_any_batch_size() -> None:
    """Wrong: the exported graph is frozen to the batch that it was traced with."""

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = LocalTables(SCHEMA, CONFIG, seed=3)

        def forward(
            self,
            sparse: Tensor,
            values: Tensor,
            lengths: Tensor,
        ) -> Tensor:
            return self.tables.embed(sparse, values, lengths)

    graph = Graph()
    first = make_batch(5)
    other = make_batch(9, seed=1)
    size = torch.export.Dim("size")
    values = torch.export.Dim("values")
    arguments = [(b.sparse_BS, b.bag_values_V, b.bag_lengths_MB) for b in (first, other)]
    exported = torch.export.export(
        graph, arguments[0], dynamic_shapes=({0: size}, {0: values}, {1: size})
    )
    torch.testing.assert_close(exported.module()(*arguments[1]), graph(*arguments[1]))
