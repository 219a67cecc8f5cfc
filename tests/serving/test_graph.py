"""The served graph: the trained model's probabilities from other operators; every backbone goes
through torch.export and ONNX."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from example import SCHEMA, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from exfm_ray.config.models import (
    MODEL_TYPES,
    DCNv2Config,
    DeepFMConfig,
    DINConfig,
    DLRMConfig,
    FinalMLPConfig,
    MaskNetConfig,
    MLPConfig,
    ModelConfig,
    WukongConfig,
)
from exfm_ray.data.batch import Batch, to_batch
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.network import build_network
from exfm_ray.models.serialization import LocalModel, StoredModel
from exfm_ray.schema import DenseFeature, Schema, SparseFeature
from exfm_ray.serving.export import _full_bags, check_batches, compare
from exfm_ray.serving.folder import write_tables
from exfm_ray.serving.graph import ServedGraph, inputs_of
from exfm_ray.serving.program import ONNX, silence_output, trace, write_onnx

pytestmark = pytest.mark.heavy

WIDE = {"ad": 3, "keywords": 2}
CONFIGS: tuple[ModelConfig, ...] = (
    WukongConfig(dim=4, l=2, n_F=2, n_L=2, k=2, fmb_mlp=(8,), mlp=(8,)),
    WukongConfig(
        dim=4,
        l=1,
        n_F=2,
        n_L=2,
        k=2,
        fmb_mlp=(8,),
        mlp=(8,),
        projection="attentive",
        attentive_mlp=(8,),
    ),
    MLPConfig(dim=4, mlp=(8,), embeddings=WIDE),
    DLRMConfig(dim=4, bottom_mlp=(8,), top_mlp=(8,)),
    DCNv2Config(dim=4, mlp=(8,)),
    DeepFMConfig(dim=4, mlp=(8,)),
    MaskNetConfig(dim=4, blocks=2, block_width=8, mask_mlp=(8,), mlp=(8,)),
    FinalMLPConfig(dim=4, mlp_1=(8,), mlp_2=(8,), gate_mlp=(4,), heads=2),
    DINConfig(dim=4, sequence_length=3, attention_mlp=(8,), mlp=(8,), embeddings=WIDE),
)
BARE = Schema(
    features=(SparseFeature(name="user", rows=9), SparseFeature(name="ad", rows=7)),
    tasks=("click",),
)


def built(config: ModelConfig, schema: Schema = SCHEMA) -> tuple[LocalModel, StoredModel]:
    """A fresh model whose rows and biases are large enough to tell one from the other."""
    tables = LocalTables(schema, config.model_copy(update={"init_std": 1.0}), seed=1)
    model = LocalModel(tables, build_network(config, schema, len(schema.tasks), seed=1)).eval()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.1
    return model, StoredModel(
        network=config, example=schema, tasks=schema.tasks, files={}, facts={}
    )


def exported(
    folder: Path,
    model: LocalModel,
    stored: StoredModel,
    rows: Batch,
) -> dict[str, float]:
    """Largest differences of the torch.export program and of ONNX Runtime from the model."""
    write_tables(folder, model.tables.tables())
    example = inputs_of(stored.example, _full_bags(rows))
    with silence_output():
        program = trace(ServedGraph.from_model(model, stored), example)
        onnx = write_onnx(program, example, folder)
    module = program.module()
    return compare(
        model, stored, {"program": lambda inputs: module(**inputs), ONNX: onnx}, check_batches(rows)
    )


def test_every_model_type_is_here() -> None:
    """Wrong: a backbone was added without a test of its export."""
    assert {config.type for config in CONFIGS} == set(MODEL_TYPES)


@pytest.mark.parametrize(
    "config", CONFIGS, ids=[f"{i}-{config.type}" for i, config in enumerate(CONFIGS)]
)
def test_every_backbone_is_exported(tmp_path: Path, config: ModelConfig) -> None:
    """Wrong: a backbone cannot be served, or ONNX Runtime computes something else for 1, 3 or 40
    rows, or for empty bags."""
    model, stored = built(config)
    rows = to_batch(make_rows(40, seed=2), SCHEMA)
    assert float(model.score(rows).std()) > 1e-3, (
        "predictions that hardly differ would hide a wrong lookup"
    )
    assert set(exported(tmp_path, model, stored, rows)) == {"program", ONNX}


@pytest.mark.parametrize(
    "dense", [(), (DenseFeature(name="age"),)], ids=["nothing else", "a dense feature"]
)
def test_a_schema_without_bags(tmp_path: Path, dense: tuple[DenseFeature, ...]) -> None:
    """Wrong: a student over single-valued features only cannot be served, or has inputs that hold
    nothing."""
    schema = BARE.model_copy(update={"dense": dense})
    model, stored = built(MLPConfig(dim=4, mlp=(8,)), schema)
    g = torch.Generator().manual_seed(0)
    sparse_BS = torch.stack(
        [torch.randint(f.rows, (20,), generator=g) for f in schema.single], dim=1
    )
    dense_BD = torch.randn(20, len(dense), generator=g)
    nothing_V = torch.zeros(0).long()
    nothing_MB = torch.zeros(0, 20).long()
    rows = Batch(sparse_BS, nothing_V, nothing_MB, dense_BD, torch.zeros(20, 1))
    exported(tmp_path, model, stored, rows)
    assert list(inputs_of(schema, rows)) == (["sparse_BS", "dense_BD"] if dense else ["sparse_BS"])


LENGTHS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=8)
GRAPHS = [
    (model, ServedGraph.from_model(model, stored))
    for model, stored in (built(CONFIGS[2]), built(CONFIGS[8]))
]


@settings(max_examples=60)
@given(lengths=LENGTHS, seed=st.integers(0, 1000))
def test_bags_of_all_lengths(lengths: list[tuple[int, int]], seed: int) -> None:
    """Wrong: a bag takes a neighbour's values, an empty one is not zero, a position is counted from
    the wrong end.

    Expected rows come from plain loops over float64 tables, not from the lookup of training.
    """
    g = torch.Generator().manual_seed(seed)
    lengths_MB = torch.tensor(lengths).T.contiguous()
    bags = [
        [torch.randint(f.rows, (int(n),), generator=g) for n in row]
        for f, row in zip(SCHEMA.bags, lengths_MB, strict=True)
    ]
    values_V = torch.cat([values for row in bags for values in row])
    sparse_BS = torch.stack(
        [torch.randint(f.rows, (len(lengths),), generator=g) for f in SCHEMA.single], dim=1
    )
    for (model, graph), positions in zip(GRAPHS, (None, 3), strict=True):
        tables = {
            name: table.double().view(len(table), -1, 4)
            for name, table in model.tables.tables().items()
        }
        expected = []
        for b, example in enumerate(sparse_BS):
            rows = [tables[f.name][i] for f, i in zip(SCHEMA.single, example, strict=True)]
            keywords = tables["keywords"][bags[0][b]]
            ads = tables["ad"][bags[1][b]]
            rows.append(keywords.mean(dim=0) if len(keywords) else torch.zeros(2, 4))
            if positions is None:
                rows.append(ads.mean(dim=0) if len(ads) else torch.zeros(3, 4))
            else:
                newest = itertools.chain(reversed(ads), itertools.repeat(torch.zeros(3, 4)))
                rows += itertools.islice(newest, positions)
            expected.append(torch.cat([row.double() for row in rows]))
        found = graph.tables(sparse_BS, values_V, lengths_MB)
        torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
