"""A stored model: the same model after loading, however many workers wrote it; damage is reported
by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from example import SCHEMA, make_rows

from exfm_ray.config.models import DCNv2Config, DLRMConfig, MLPConfig, ModelConfig, WukongConfig
from exfm_ray.data.batch import to_batch
from exfm_ray.errors import UserError
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.network import build_network
from exfm_ray.models.serialization import (
    MANIFEST,
    LocalModel,
    commit_model,
    load_model,
    load_rows,
    read_stored_model,
    remove_model,
    write_tables,
)
from exfm_ray.storage.atomic import read_json, write_json

MODELS: list[ModelConfig] = [
    MLPConfig(dim=4, mlp=(8,)),
    DLRMConfig(dim=4, bottom_mlp=(4,), top_mlp=(8,)),
    DCNv2Config(dim=4, mlp=(8,)),
    WukongConfig(dim=4, l=2, n_F=2, n_L=2, k=2, fmb_mlp=(8,), mlp=(8,)),
]


def store(
    folder: Path,
    config: ModelConfig,
    cuts: int,
) -> LocalModel:
    """Write a model whose tables `cuts` workers hold, rows of each table in turn."""
    model = LocalModel(
        LocalTables(SCHEMA, config, seed=1), build_network(config, SCHEMA, 2, seed=1)
    ).eval()
    for rank in reversed(range(cuts)):
        shards = {}
        for name, table in model.tables.tables().items():
            size = -(-len(table) // cuts)
            shards[f"{name}@{rank * size}"] = table[rank * size : (rank + 1) * size]
        write_tables(folder, rank, shards)
    commit_model(folder, config, SCHEMA, SCHEMA.tasks, model.network.state_dict(), {"who": "tests"})
    return model


@pytest.mark.parametrize("cuts", [1, 3])
@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.type)
def test_loads_what_was_written(
    tmp_path: Path,
    config: ModelConfig,
    cuts: int,
) -> None:
    """Wrong: a served model differs from the trained one, or its tables' parts are put together in
    the wrong order."""
    model = store(tmp_path, config, cuts)
    batch = to_batch(make_rows(50, seed=3), SCHEMA)
    loaded, manifest = load_model(tmp_path)
    assert torch.equal(loaded.score(batch), model.score(batch))
    assert (manifest.network, manifest.example, manifest.tasks, manifest.facts) == (
        config,
        SCHEMA,
        SCHEMA.tasks,
        {"who": "tests"},
    )
    assert not loaded.training


@pytest.mark.parametrize("file", ["tables.0000.safetensors", "dense.safetensors"])
def test_refuses_damage(tmp_path: Path, file: str) -> None:
    """Wrong: a damaged or exchanged file is served."""
    store(tmp_path, MODELS[0], 1)
    data = bytearray((tmp_path / file).read_bytes())
    data[-1] ^= 1
    (tmp_path / file).write_bytes(data)
    with pytest.raises(
        UserError, match=rf"{file}: missing or not the file that model.json describes"
    ):
        load_model(tmp_path)


def test_refuses_what_is_no_model(tmp_path: Path) -> None:
    """Wrong: a folder without a whole model ends in a traceback."""
    store(tmp_path, MODELS[0], 1)
    manifest = read_json(tmp_path / MANIFEST)
    write_json(tmp_path / MANIFEST, manifest | {"network": {"type": "magic"}})
    with pytest.raises(UserError, match=r"model.json: not a model manifest"):
        load_model(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"model.json: no such file"):
        load_model(tmp_path)


def test_a_manifest_with_a_missing_file_is_reported(tmp_path: Path) -> None:
    """Wrong: a file that is lost from the manifest ends in a traceback, or a holder of a part of
    the tables gets too few rows."""
    store(tmp_path, MODELS[0], 2)
    manifest = read_json(tmp_path / MANIFEST)
    for file, message in (
        ("dense.safetensors", "model.json: names no dense.safetensors; this model is damaged"),
        (
            "tables.0001.safetensors",
            "model.json: its files of tables are incomplete .table 'user' has shape",
        ),
    ):
        write_json(
            tmp_path / MANIFEST,
            manifest
            | {
                "files": {
                    name: hashed for name, hashed in manifest["files"].items() if name != file
                }
            },
        )
        with pytest.raises(UserError, match=message):
            load_model(tmp_path)
    rows = {name: range(1, count) for name, count in SCHEMA.tables.items()}
    with pytest.raises(
        UserError,
        match="model.json: its files of tables miss rows of 'user'; this model is damaged",
    ):
        load_rows(tmp_path, read_stored_model(tmp_path), rows)
    write_json(tmp_path / MANIFEST, manifest)
    assert {
        name: len(table)
        for name, table in load_rows(tmp_path, read_stored_model(tmp_path), rows).items()
    } == {n: len(r) for n, r in rows.items()}


def test_an_older_runs_table_file_does_not_get_in(tmp_path: Path) -> None:
    """Wrong: a file that the manifest does not name (of a run with more workers, into the same
    folder) is loaded too."""
    model = store(tmp_path, MODELS[0], 1)
    write_tables(tmp_path, 1, {"user@0": torch.full((101, 4), 9.0)})
    loaded, _ = load_model(tmp_path)
    torch.testing.assert_close(loaded.tables.weight, model.tables.weight)


def test_a_model_that_was_begun_leaves_nothing_in_the_next_one(tmp_path: Path) -> None:
    """Wrong: the table files of a writer with more workers, which was killed before its manifest or
    after it, are named by the next model's."""
    remove_model(tmp_path / "none")
    for begun in (
        lambda: store(tmp_path / "model", MODELS[1], 3),
        lambda: write_tables(tmp_path / "model", 1, {"user@0": torch.ones(101, 4)}),
    ):
        begun()
        remove_model(tmp_path / "model")
        assert not (tmp_path / "model" / MANIFEST).exists()
        model = store(tmp_path / "model", MODELS[0], 1)
        loaded, manifest = load_model(tmp_path / "model")
        assert torch.equal(loaded.tables.weight, model.tables.weight) and sorted(
            manifest.files
        ) == ["dense.safetensors", "tables.0000.safetensors"]


def test_a_manifest_of_another_network_is_reported(tmp_path: Path) -> None:
    """Wrong: a setting that is lost from the manifest, so that its default counts, ends in torch's
    traceback."""
    store(tmp_path, MODELS[-1], 1)
    manifest = read_json(tmp_path / MANIFEST)
    del manifest["network"]["n_L"]
    write_json(tmp_path / MANIFEST, manifest)
    with pytest.raises(
        UserError, match="model.json: describes another network than .*size mismatch"
    ):
        load_model(tmp_path)
