"""A model at rest: safetensors and JSON, hashed, never a pickle. FM snapshots and exported VMs have
this one form.

<folder>/tables.0000.safetensors   one file a worker: its rows of every table, keyed
`table@first_row` <folder>/momentum.0000.safetensors where it is asked for, the rows' Adagrad state,
in the same form
<folder>/dense.safetensors         the serving network
<folder>/history.safetensors       of an exported arm with +history: what it reads of each user (`models.past`)
<folder>/model.json                written last: network, schema, tasks, hashes of the files, what the writer adds
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
"""Beside a remote file while its model is written: its hash."""
TABLES = "tables"
MOMENTUM = "momentum"
DENSE = "dense.safetensors"


class StoredModel(FrozenModel):
    """The manifest. `facts` is what the writer says of the model: teacher and version, or VM, arm
    and windows learnt."""

    network: ModelConfig
    example: Schema
    tasks: tuple[str, ...]
    files: dict[str, str]
    facts: dict[str, Any]

    @property
    def remembered(self) -> int:
        """How many of the last dense features are a history (`models.past`)."""
        return int(self.facts["history"]["inputs"]) if "history" in self.facts else 0

    @property
    def stream(self) -> Schema:
        """The schema of the stream: the example's without a history."""
        told = self.example.model_dump()
        kept = len(told["dense"]) - self.remembered
        return (
            Schema.model_validate(told | {"dense": told["dense"][:kept]})
            if self.remembered
            else self.example
        )


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
        """Logits_BT, float32."""
        embedded_BRE = self.tables.embed(sparse_BS, bag_values_V, bag_lengths_MB)
        logits_BT: Tensor = self.network(embedded_BRE, dense_BD).float()
        return logits_BT

    @torch.inference_mode()
    def score(self, batch: Batch) -> Tensor:
        """Probabilities_BT, float32."""
        return torch.sigmoid(
            self(batch.sparse_BS, batch.bag_values_V, batch.bag_lengths_MB, batch.dense_BD)
        )


def remove_model(folder: AnyPath) -> None:
    """Remove what is stored in a folder, its manifest first, before anything is written there anew:
    a file of a writer that was killed, or had more workers, would get into the new model."""
    (folder / MANIFEST).unlink(missing_ok=True)
    remove_tree(folder)


def write_tables(
    folder: AnyPath,
    rank: int,
    shards: Mapping[str, Tensor],
    kind: str = TABLES,
) -> None:
    """Write one worker's rows of the tables, or another `kind` of numbers about its rows."""
    _write(folder / f"{kind}.{rank:04d}.safetensors", shards)


def table_parts(folder: AnyPath, kind: str = TABLES) -> Iterator[tuple[str, int, Tensor]]:
    """What `write_tables` wrote of a stored model: table, first row, rows; one file at a time,
    hashes not checked."""
    for name, hashed in sorted(read_stored_model(folder).files.items()):
        if name.startswith(f"{kind}."):
            for key, rows in load_file(local_copy(folder / name, hashed)).items():
                table, _, first_row = key.rpartition("@")
                yield table, int(first_row), rows


def whole_tables(folder: AnyPath, kind: str = TABLES) -> dict[str, Tensor]:
    """All parts of each table together."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for table, first_row, rows in table_parts(folder, kind):
        parts.setdefault(table, []).append((first_row, rows))
    return {
        name: torch.cat([rows for _, rows in sorted(p, key=lambda part: part[0])])
        for name, p in parts.items()
    }


def commit_model(
    folder: AnyPath,
    network: ModelConfig,
    schema: Schema,
    tasks: tuple[str, ...],
    dense: Mapping[str, Tensor],
    facts: dict[str, Any],
) -> None:
    """Write the network, hash all files of the folder, write the manifest: from now on the model is
    there.

    Args:
        dense: the serving network's state dict.
    """
    _write(folder / DENSE, dense)
    written: list[AnyPath] = list(folder.glob("*.safetensors"))
    files = {path.name: _hash(path) for path in sorted(written, key=str)}
    manifest = StoredModel(network=network, example=schema, tasks=tasks, files=files, facts=facts)
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def _write(path: AnyPath, tensors: Mapping[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        if not isinstance(path, Path):  # who writes the manifest need not fetch it
            write_text(path.with_name(path.name + HASH), sha256(temporary))


def _hash(path: AnyPath) -> str:
    return sha256(path) if isinstance(path, Path) else path.with_name(path.name + HASH).read_text()


def copy_model(source: AnyPath, target: AnyPath) -> None:
    """Copy a stored model, its manifest last; UserError for a damaged one."""
    for name, hashed in checked_manifest(source).files.items():
        with atomic_path(target / name) as temporary:
            shutil.copyfile(local_copy(source / name, hashed), temporary)
    write_text(target / MANIFEST, (source / MANIFEST).read_text())


def read_stored_model(folder: AnyPath) -> StoredModel:
    """The manifest of a stored model; UserError where there is none or it is damaged."""
    return read_manifest(folder / MANIFEST, StoredModel, "a model manifest")


def checked_manifest(folder: AnyPath) -> StoredModel:
    """The manifest of a stored model whose files have the hashes that it names; UserError for a
    damaged one."""
    manifest = read_stored_model(folder)
    if DENSE not in manifest.files:
        raise UserError(f"{folder / MANIFEST}: names no {DENSE}; this model is damaged")
    for name, expected in manifest.files.items():
        if PurePath(name).name != name or not verify_sha256(folder / name, expected):
            raise UserError(
                f"{folder / name}: missing or not the file that {MANIFEST} describes; this model is damaged"
            )
    return manifest


def load_network(folder: AnyPath, manifest: StoredModel) -> Network:
    """The dense part of a stored model."""
    network = Network(manifest.network, manifest.example, len(manifest.tasks))
    try:
        network.load_state_dict(load_file(local_copy(folder / DENSE, manifest.files[DENSE])))
    except RuntimeError as error:  # names or shapes of other weights
        told = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(
            f"{folder / MANIFEST}: describes another network than {DENSE} holds ({told[0].strip()}); this model is damaged"
        ) from None
    return network


def load_model(folder: AnyPath) -> tuple[LocalModel, StoredModel]:
    """Load a stored model onto the CPU, its files checked against their hashes."""
    manifest = checked_manifest(folder)
    tables = LocalTables(manifest.example, manifest.network, seed=None)
    try:
        tables.load_tables(whole_tables(folder))
    except ValueError as error:
        raise UserError(
            f"{folder / MANIFEST}: its files of tables are not all there is ({error}); this model is damaged"
        ) from None
    return LocalModel(tables, load_network(folder, manifest)).eval(), manifest


def load_rows(
    folder: AnyPath,
    manifest: StoredModel,
    rows: Mapping[str, range],
) -> dict[str, Tensor]:
    """Some consecutive rows of each table, (rows, width of the table): only they are read from the
    disk."""
    parts: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in rows}
    for file in (name for name in sorted(manifest.files) if name.startswith(f"{TABLES}.")):
        with safe_open(local_copy(folder / file, manifest.files[file]), framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name, _, first = key.rpartition("@")
                held = handle.get_slice(key)
                start, stop = (
                    min(max(row - int(first), 0), held.get_shape()[0])
                    for row in (rows[name].start, rows[name].stop)
                )
                parts[name].append((int(first), held[start:stop]))
    for name, wanted in rows.items():
        if sum(len(part) for _, part in parts[name]) != len(wanted):
            raise UserError(
                f"{folder / MANIFEST}: its files of tables lack rows of '{name}'; this model is damaged"
            )
    return {
        name: torch.cat([part for _, part in sorted(p, key=lambda item: item[0])])
        for name, p in parts.items()
    }
