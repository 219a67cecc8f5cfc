"""A stored model: safetensors and JSON, hashed, never a pickle.

FM snapshots and exported VMs have this form:

<folder>/tables.0000.safetensors     one file per worker: its rows of every table, keyed
                                     `table@first_row`
<folder>/momentum.0000.safetensors   the rows' Adagrad state in the same form, if requested
<folder>/dense.safetensors           the serving network
<folder>/history.safetensors         exported arms with +history: features of each user
                                     (`models.user_features`)
<folder>/model.json                  written last: network, schema, tasks, hashes of the files,
                                     facts that the writer adds

Loading a model imports only the module that a network `type` of the form `my_module:MyModel` names.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exfm_ray.base import FrozenModel
from exfm_ray.config.models import ModelConfig
from exfm_ray.data.batch import Batch
from exfm_ray.errors import UserError
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.network import Network
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import (
    atomic_path,
    remove_tree,
    sha256,
    write_json,
    write_text,
)
from exfm_ray.storage.cache import local_copy, verify_sha256
from exfm_ray.storage.manifest import read_manifest
from exfm_ray.storage.remote import AnyPath

MANIFEST = "model.json"
HASH = ".sha256"
"""Suffix of a file with the hash of a remote file, while its model is being written."""
TABLES = "tables"
MOMENTUM = "momentum"
DENSE = "dense.safetensors"

Parts = list[tuple[int, Tensor]]
"""Parts of a table in any order: number of the first row, rows."""


class StoredModel(FrozenModel):
    """The manifest.

    Attributes:
        network: settings of the interaction model.
        example: schema of the model's inputs.
        tasks: the tasks, in the order of the outputs.
        files: name of a file -> its SHA-256.
        facts: what the writer adds: teacher and version, or VM, arm and windows learned.
    """

    network: ModelConfig
    example: Schema
    tasks: tuple[str, ...]
    files: dict[str, str]
    facts: dict[str, Any]

    @property
    def remembered(self) -> int:
        """Number of the last dense features that are user features (`models.user_features`)."""
        history = self.facts.get("history")
        return int(history["inputs"]) if history is not None else 0

    @property
    def stream(self) -> Schema:
        """The schema of the stream: that of the inputs without user features."""
        if not self.remembered:
            return self.example
        fields = self.example.model_dump()
        stream_features = len(fields["dense"]) - self.remembered
        fields["dense"] = fields["dense"][:stream_features]
        return Schema.model_validate(fields)


class LocalModel(nn.Module):
    """Tables and network on one device: what a scorer runs and what is served."""

    def __init__(self, tables: LocalTables, network: Network) -> None:
        super().__init__()
        self.tables = tables
        self.network = network

    def forward(
        self,
        sparse_BS: Tensor,
        bag_values_V: Tensor,
        bag_lengths_MB: Tensor,
        dense_BD: Tensor,
    ) -> Tensor:
        """Compute float32 logits_BT from the tensors of a `Batch`."""
        embedded_BRE = self.tables.embed(sparse_BS, bag_values_V, bag_lengths_MB)
        logits_BT: Tensor = self.network(embedded_BRE, dense_BD).float()
        return logits_BT

    @torch.inference_mode()
    def score(self, batch: Batch) -> Tensor:
        """Compute float32 probabilities_BT of a batch."""
        logits_BT = self(batch.sparse_BS, batch.bag_values_V, batch.bag_lengths_MB, batch.dense_BD)
        return torch.sigmoid(logits_BT)


def remove_model(folder: AnyPath) -> None:
    """Remove a stored model, its manifest first. Call this before writing to the folder again.

    Otherwise a file of a writer that was killed, or had more workers, would become part of the new
    model.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    remove_tree(folder)


def write_tables(
    folder: AnyPath,
    rank: int,
    shards: Mapping[str, Tensor],
    kind: str = TABLES,
) -> None:
    """Write one worker's rows of the tables, or another kind of numbers about its rows.

    Args:
        folder: where the model is stored.
        rank: number of the worker.
        shards: `table@first_row` -> consecutive rows.
        kind: TABLES or MOMENTUM.
    """
    _write(folder / f"{kind}.{rank:04d}.safetensors", shards)


def table_parts(folder: AnyPath, kind: str = TABLES) -> Iterator[tuple[str, int, Tensor]]:
    """Read what `write_tables` wrote, one file at a time, without checking hashes.

    Yields:
        Name of the table, number of the first row, rows.
    """
    manifest = read_stored_model(folder)
    for file in _table_files(manifest, kind):
        path = local_copy(folder / file, manifest.files[file])
        for key, rows in load_file(path).items():
            table, first_row = _parse_key(key)
            yield table, first_row, rows


def _table_files(manifest: StoredModel, kind: str) -> list[str]:
    return [name for name in sorted(manifest.files) if name.startswith(f"{kind}.")]


def _parse_key(key: str) -> tuple[str, int]:
    table, _, first_row = key.rpartition("@")
    return table, int(first_row)


def whole_tables(folder: AnyPath, kind: str = TABLES) -> dict[str, Tensor]:
    """Read all tables of a stored model."""
    parts: dict[str, Parts] = {}
    for table, first_row, rows in table_parts(folder, kind):
        parts.setdefault(table, []).append((first_row, rows))
    return {table: _concatenate(pieces) for table, pieces in parts.items()}


def _concatenate(parts: Parts) -> Tensor:
    parts = sorted(parts, key=lambda part: part[0])
    rows = [rows for _, rows in parts]
    return torch.cat(rows)


def commit_model(
    folder: AnyPath,
    network: ModelConfig,
    schema: Schema,
    tasks: tuple[str, ...],
    dense: Mapping[str, Tensor],
    facts: dict[str, Any],
) -> None:
    """Write the network, hash all files of the folder, and write the manifest.

    Once the manifest is written, the model is complete.

    Args:
        folder: where the tables have been written.
        network: settings of the interaction model.
        schema: schema of the model's inputs.
        tasks: the tasks, in the order of the outputs.
        dense: the serving network's state dict.
        facts: what else the manifest says of the model.
    """
    _write(folder / DENSE, dense)

    paths: list[AnyPath] = list(folder.glob("*.safetensors"))
    paths.sort(key=str)
    files = {path.name: _hash(path) for path in paths}
    manifest = StoredModel(
        network=network,
        example=schema,
        tasks=tasks,
        files=files,
        facts=facts,
    )
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def _write(path: AnyPath, tensors: Mapping[str, Tensor]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary)
        if not isinstance(path, Path):  # so the writer of the manifest need not download the file
            write_text(_hash_path(path), sha256(temporary))


def _hash(path: AnyPath) -> str:
    if isinstance(path, Path):
        return sha256(path)
    return _hash_path(path).read_text()


def _hash_path(path: AnyPath) -> AnyPath:
    return path.with_name(path.name + HASH)


def copy_model(source: AnyPath, target: AnyPath) -> None:
    """Copy a stored model, its manifest last.

    Raises:
        UserError: the model is damaged.
    """
    manifest = checked_manifest(source)
    for name, expected_hash in manifest.files.items():
        local = local_copy(source / name, expected_hash)
        with atomic_path(target / name) as temporary:
            shutil.copyfile(local, temporary)

    text = (source / MANIFEST).read_text()
    write_text(target / MANIFEST, text)


def read_stored_model(folder: AnyPath) -> StoredModel:
    """Read the manifest of a stored model.

    Raises:
        UserError: there is no manifest, or it is damaged.
    """
    return read_manifest(folder / MANIFEST, StoredModel, "a model manifest")


def checked_manifest(folder: AnyPath) -> StoredModel:
    """Read the manifest of a stored model and check the hashes of its files.

    Raises:
        UserError: the model is damaged.
    """
    manifest = read_stored_model(folder)
    if DENSE not in manifest.files:
        raise UserError(f"{folder / MANIFEST}: names no {DENSE}; this model is damaged")

    for name, expected_hash in manifest.files.items():
        is_plain_name = PurePath(name).name == name
        if not is_plain_name or not verify_sha256(folder / name, expected_hash):
            raise UserError(
                f"{folder / name}: missing or not the file that {MANIFEST} describes; "
                "this model is damaged"
            )
    return manifest


def load_network(folder: AnyPath, manifest: StoredModel) -> Network:
    """Load the dense part of a stored model.

    Raises:
        UserError: the weights do not fit the network that the manifest describes.
    """
    network = Network(manifest.network, manifest.example, len(manifest.tasks))
    weights = load_file(local_copy(folder / DENSE, manifest.files[DENSE]))
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:  # other names or shapes
        lines = str(error).splitlines()
        reason = lines[1] if len(lines) > 1 else str(error)
        raise UserError(
            f"{folder / MANIFEST}: describes another network than {DENSE} holds "
            f"({reason.strip()}); this model is damaged"
        ) from None
    return network


def load_model(folder: AnyPath) -> tuple[LocalModel, StoredModel]:
    """Load a stored model onto the CPU and check its files against their hashes.

    Raises:
        UserError: the model is damaged.
    """
    manifest = checked_manifest(folder)
    tables = LocalTables(manifest.example, manifest.network, seed=None)
    try:
        tables.load_tables(whole_tables(folder))
    except ValueError as error:
        raise UserError(
            f"{folder / MANIFEST}: its files of tables are incomplete ({error}); "
            "this model is damaged"
        ) from None

    network = load_network(folder, manifest)
    return LocalModel(tables, network).eval(), manifest


def load_rows(
    folder: AnyPath,
    manifest: StoredModel,
    rows: Mapping[str, range],
) -> dict[str, Tensor]:
    """Read some consecutive rows of each table, and only them, from the disk.

    Args:
        folder: where the model is stored.
        manifest: its manifest.
        rows: table -> row numbers.

    Returns:
        Table -> (rows, width of the table).

    Raises:
        UserError: rows are missing.
    """
    parts: dict[str, Parts] = {name: [] for name in rows}
    for file in _table_files(manifest, TABLES):
        path = local_copy(folder / file, manifest.files[file])
        with safe_open(path, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name, first_row = _parse_key(key)
                stored = handle.get_slice(key)
                stored_rows = stored.get_shape()[0]
                start = _clamp(rows[name].start - first_row, stored_rows)
                stop = _clamp(rows[name].stop - first_row, stored_rows)
                parts[name].append((first_row, stored[start:stop]))

    tables = {}
    for name, requested in rows.items():
        tables[name] = _concatenate(parts[name]) if parts[name] else torch.empty(0)
        if len(tables[name]) != len(requested):
            raise UserError(
                f"{folder / MANIFEST}: its files of tables miss rows of '{name}'; "
                "this model is damaged"
            )
    return tables


def _clamp(row: int, rows: int) -> int:
    """The row nearest to `row` in [0, rows]."""
    return min(max(row, 0), rows)
