"""Which rows a model is given: slots in order, bags taken apart, against plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from exfm_ray.config.models import DINConfig, MLPConfig, ModelConfig
from exfm_ray.data.batch import Batch
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.layout import POOLED, Inputs, Layout, SequenceRows, expand_bags
from exfm_ray.schema import Kind, Schema, SparseFeature

SCHEMA = Schema(
    features=(
        SparseFeature(name="genres", kind=Kind.MULTI, rows=5, max_length=3),
        SparseFeature(name="clicked", kind=Kind.SEQUENCE, rows=7, table="item", max_length=4),
        SparseFeature(name="user", rows=11),
        SparseFeature(name="item", rows=7),
        SparseFeature(name="seen", kind=Kind.SEQUENCE, rows=7, table="item", max_length=2),
    ),
    tasks=("click",),
)
CONFIGS: dict[str, ModelConfig] = {
    "pooled": MLPConfig(dim=4, embeddings={"item": 2, "genres": 3}),
    "unpooled": DINConfig(dim=4, sequence_length=3),
    "both": DINConfig(dim=4, sequence_length=3, embeddings={"item": 2, "user": 3}),
}


def make_batch(size: int) -> tuple[Batch, dict[str, list[list[int]]]]:
    """A random batch, and its values by feature and example."""
    generator = torch.Generator().manual_seed(size)
    ids: dict[str, list[list[int]]] = {}
    for f in (*SCHEMA.single, *SCHEMA.bags):
        lengths = [
            1
            if f.kind is Kind.SINGLE
            else int(torch.randint(0, f.max_length + 1, (), generator=generator))
            for _ in range(size)
        ]
        ids[f.name] = [
            torch.randint(0, f.rows, (n,), generator=generator).tolist() for n in lengths
        ]
    sparse_BS = torch.tensor(
        [[ids[f.name][b][0] for f in SCHEMA.single] for b in range(size)]
    ).view(size, -1)
    values = [value for f in SCHEMA.bags for bag in ids[f.name] for value in bag]
    lengths_MB = torch.tensor([[len(bag) for bag in ids[f.name]] for f in SCHEMA.bags])
    return Batch(
        sparse_BS,
        torch.tensor(values, dtype=torch.int64),
        lengths_MB,
        torch.empty(size, 0),
        torch.zeros(size, 1),
    ), ids


def one_by_one(
    tables: dict[str, Tensor],
    config: ModelConfig,
    ids: dict[str, list[list[int]]],
    size: int,
) -> Tensor:
    """One nn.Embedding for every slot, one example after the other."""
    examples = []
    for b in range(size):
        rows: list[Tensor] = []
        for f in (*SCHEMA.single, *SCHEMA.bags):
            table = f.table or f.name
            embedding = nn.Embedding.from_pretrained(tables[table])
            values = ids[f.name][b]
            if f.kind is Kind.SEQUENCE and config.unpooled:
                newest_first = [[value] for value in reversed(values)] + [[]] * f.max_length
                slots = newest_first[: min(config.unpooled, f.max_length)]
            else:
                slots = [values]
            for slot in slots:
                vectors = [embedding(torch.tensor(value)) for value in slot]
                mean = (
                    sum(vectors) / len(vectors) if vectors else torch.zeros(tables[table].shape[1])
                )
                rows += mean.split(config.dim)
        examples.append(torch.stack(rows))
    return torch.stack(examples)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("size", [1, 40])
def test_plain_tables_equal_one_embedding_per_slot(config: ModelConfig, size: int) -> None:
    """Wrong: an id's second embedding is another id's first, positions are counted from the oldest,
    or slots are out of order."""
    tables = LocalTables(SCHEMA, config, seed=3)
    (batch, ids) = make_batch(size)
    expected = one_by_one(tables.tables(), config, ids, size)
    assert expected.shape[1] == Layout.from_config(config, SCHEMA).rows
    torch.testing.assert_close(tables(batch).detach(), expected)


def test_rows_are_in_the_order_of_the_features() -> None:
    """Wrong: a model reads one feature's rows as another's, or a sequence's target is not the
    feature that it is a history of."""
    layout = Layout.from_config(CONFIGS["both"], SCHEMA)
    slots = [(slot.key, slot.first, slot.width) for slot in (*layout.single, *layout.bags)]
    assert slots == [
        ("user", 0, 3),
        ("item", 3, 2),
        ("domain", 5, 1),
        ("genres", 6, 1),
        ("clicked:0", 7, 2),
        ("clicked:1", 9, 2),
        ("clicked:2", 11, 2),
        ("seen:0", 13, 2),
        ("seen:1", 15, 2),
    ]
    sequences = (
        SequenceRows(first=7, length=3, width=2, target=3),
        SequenceRows(first=13, length=2, width=2, target=3),
    )
    assert layout.inputs(5) == Inputs(17, 5, sequences)
    assert Layout.from_config(CONFIGS["pooled"], SCHEMA).inputs(0) == Inputs(
        1 + 2 + 1 + 3 + 2 + 2, 0
    )


BAGS = st.integers(1, 3).flatmap(
    lambda bags: st.lists(
        st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=bags, max_size=bags), max_size=4
    )
)


@given(BAGS, st.data())
def test_expand_bags(examples: list[list[list[int]]], data: st.DataObject) -> None:
    """Wrong: a slot takes a neighbour's value, an absent position is not empty, or values are not
    slot after slot."""
    bags = len(examples[0]) if examples else 2
    slots = data.draw(
        st.lists(
            st.tuples(st.integers(0, bags - 1), st.sampled_from([POOLED, 0, 1, 3, 5])), max_size=5
        )
    )
    per_bag = [[example[m] for example in examples] for m in range(bags)]
    expected = []
    for bag, position in slots:
        for values in per_bag[bag]:
            newest_first = values[::-1]
            expected.append(values if position == POOLED else newest_first[position : position + 1])
    values_W, lengths_OB = expand_bags(
        torch.tensor(
            [value for bag in per_bag for values in bag for value in values], dtype=torch.int64
        ),
        torch.tensor([[len(values) for values in bag] for bag in per_bag], dtype=torch.int64),
        torch.tensor([bag for bag, _ in slots], dtype=torch.int64),
        torch.tensor([position for _, position in slots], dtype=torch.int64),
    )
    assert lengths_OB.shape == (len(slots), len(examples))
    assert lengths_OB.flatten().tolist() == [len(values) for values in expected]
    assert values_W.tolist() == [value for values in expected for value in values]


def test_an_unknown_table_is_refused_with_the_nearest_name() -> None:
    """Wrong: a typing error in `embeddings` leaves a table with one embedding without a word."""
    with pytest.raises(ValueError, match=r"embeddings: no table is named 'itm'.*'item'"):
        Layout.from_config(MLPConfig(embeddings={"itm": 2}), SCHEMA)
    with pytest.raises(
        ValueError,
        match=r"embeddings: no table is named 'clicked'. There are user, item, domain, genres",
    ):
        Layout.from_config(MLPConfig(embeddings={"clicked": 2}), SCHEMA)


def test_a_sequence_without_target_is_refused() -> None:
    """Wrong: a history is weighed against a feature of other ids."""
    alone = Schema(
        features=(SparseFeature(name="queries", kind=Kind.SEQUENCE, rows=9, max_length=3),),
        tasks=("click",),
    )
    assert Layout.from_config(MLPConfig(), alone).inputs(0) == Inputs(2, 0)
    with pytest.raises(
        ValueError, match="sequence feature 'queries' has no target: .* give it the `table`"
    ):
        Layout.from_config(DINConfig(), alone).inputs(0)
