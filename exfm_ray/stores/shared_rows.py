"""Rows of the teacher's tables, given to vertical models: for each window and domain those of the
ids that occur in it.

    <store>/<teacher>/window=003/<domain>.safetensors   ids/<table> int64 (X), rows/<table> float32
    (X, W), momentum/<table> float32 (X)
    <store>/<teacher>/window=003/manifest.json          written last

The rows are of the snapshot that supervises the window, so they know nothing of it (rule 2). What a
window does not name it does not need; so each one is a change to what was given before, and small
beside the tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exfm_ray.base import FrozenModel
from exfm_ray.config.root import Config
from exfm_ray.data.stream import EventStream, Window, list_values, window_name
from exfm_ray.errors import UserError
from exfm_ray.models.serialization import MOMENTUM, table_parts
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import atomic_path, sha256, write_json
from exfm_ray.storage.cache import local_copy, verify_sha256
from exfm_ray.storage.manifest import read_manifest
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore, rebuild_hint

Ids = np.ndarray[Any, np.dtype[np.int64]]


class TableRows(NamedTuple):
    """Rows of a table: their numbers, int64 ascending (X), the rows, float32 (X, W), their Adagrad
    state (X) where it is given."""

    id_X: Ids
    row_XW: Tensor
    momentum_X: Tensor | None


class DomainFile(FrozenModel):
    """One domain's file."""

    file: str
    sha256: str
    rows: int
    bytes: int


class SharedRowsManifest(FrozenModel):
    """The manifest of a window's rows. `widths`: W of each table; `momentum`: with the tables'
    Adagrad state; `asked`: the version that was to give them, where that one is damaged and an
    older one did in its place."""

    window: int
    teacher: str
    snapshot: int
    schema_digest: str
    widths: dict[str, int]
    momentum: bool
    domains: dict[str, DomainFile]
    asked: int | None = None


@dataclass(frozen=True)
class SharedStore:
    """What one teacher gives."""

    root: AnyPath
    teacher: str

    def folder(self, window: int) -> AnyPath:
        """Where a window's rows lie."""
        return self.root / self.teacher / window_name(window)

    def has(self, window: int) -> bool:
        """True when a window's rows are committed."""
        return (self.folder(window) / "manifest.json").exists()

    def publish(
        self,
        stream: EventStream,
        window: Window,
        snapshots: SnapshotStore,
        version: int,
        domains: Sequence[str],
        tables: Sequence[str],
        policy: SnapshotPolicy,
    ) -> None:
        """Write the rows that a window's examples of each domain read, with their Adagrad state
        where the snapshot holds it.

        Refuses a snapshot that may have learned the window (rule 2).

        Args:
            tables: names; none: all tables.
        """
        if not policy.may_supervise(version, window.index):
            raise UserError(
                f"window {window.index} must not be given rows of snapshot {version}: with das.fm_lag = {policy.fm_lag} it takes one that has "
                f"learned no window after {window.index - policy.fm_lag}"
            )
        folder = self.folder(window.index)
        schema = stream.schema
        own = [name for name in schema.tables if name in tables or not tables]
        # mapped into memory, file by file: of a teacher larger than this process only the rows that
        # are given come into it
        held = list(snapshots.tables(version, schema))
        state = list(table_parts(snapshots.folder(version), MOMENTUM))
        parts = {}
        for domain in domains:
            ids = ids_of(stream, window, domain, own)
            path = folder / f"{domain}.safetensors"
            tensors = {f"ids/{name}": torch.from_numpy(id_X) for name, id_X in ids.items()}
            tensors |= {f"rows/{name}": rows for name, rows in rows_of(held, ids).items()}
            tensors |= {f"momentum/{name}": rows for name, rows in rows_of(state, ids).items()}
            with atomic_path(path) as temporary:
                save_file(tensors, temporary)
                size = temporary.stat().st_size
                hashed = sha256(temporary)
            parts[domain] = DomainFile(
                file=path.name,
                sha256=hashed,
                rows=sum(len(id_X) for id_X in ids.values()),
                bytes=size,
            )
        manifest = SharedRowsManifest(
            window=window.index,
            teacher=self.teacher,
            snapshot=version,
            schema_digest=schema.digest,
            momentum=bool(state),
            domains=parts,
            widths={
                name: next(rows.shape[1] for table, _, rows in held if table == name)
                for name in own
            },
            asked=None if version == policy.version(window.index) else policy.version(window.index),
        )
        write_json(folder / "manifest.json", manifest.model_dump(mode="json"))

    def manifest(self, window: int) -> SharedRowsManifest:
        """The manifest of a committed window; UserError where it is missing or damaged."""
        folder = self.folder(window)
        path = folder / "manifest.json"
        if not path.exists():
            raise UserError(
                f"{path}: window {window} has no rows of teacher '{self.teacher}'; run the DAS on it"
            )
        return read_manifest(
            path, SharedRowsManifest, "a manifest of shared rows", rebuild_hint(folder)
        )

    def read(
        self,
        window: int,
        domain: str,
        schema: Schema,
        policy: SnapshotPolicy,
    ) -> dict[str, TableRows]:
        """A domain's rows by table, checked: window, teacher, snapshot, schema and the file's
        hash."""
        manifest = self.manifest(window)
        folder = self.folder(window)
        again = f"; {rebuild_hint(folder)}"
        if (manifest.window, manifest.teacher) != (window, self.teacher):
            raise UserError(
                f"{folder}: holds rows of window {manifest.window} and teacher '{manifest.teacher}'{again}"
            )
        asked = manifest.snapshot if manifest.asked is None else manifest.asked
        wanted = policy.version(window)
        if asked != wanted or not policy.may_supervise(manifest.snapshot, window):
            raise UserError(
                f"{folder}: rows of snapshot {manifest.snapshot}, das.fm_lag = {policy.fm_lag} asks for {wanted}{again}"
            )
        if manifest.schema_digest != schema.digest:
            raise UserError(
                f"{folder}: its rows are numbered by another schema (other features, rows or encodings) than the stream's{again}"
            )
        if domain not in manifest.domains:
            raise UserError(
                f"{folder}: no rows for domain '{domain}', only for {', '.join(manifest.domains) or 'none'}{again}"
            )
        part = manifest.domains[domain]
        path = folder / part.file
        if PurePath(part.file).name != part.file or not verify_sha256(path, part.sha256):
            raise UserError(f"{path}: missing or not the file that its manifest describes{again}")
        tensors = load_file(local_copy(path, part.sha256))
        return {
            name: TableRows(
                tensors[f"ids/{name}"].numpy(),
                tensors[f"rows/{name}"],
                tensors.get(f"momentum/{name}"),
            )
            for name in manifest.widths
            if f"ids/{name}" in tensors
        }


def shared_store(config: Config, teacher: str | None = None) -> SharedStore | None:
    """Where the rows of a run's FM, or of another of its teachers, lie; None where no arm takes
    them."""
    shares = any(arm.shares_tables for arm in config.arms)
    return SharedStore(config.stores / "shared", teacher or config.fm.name) if shares else None


def rows_of(parts: Sequence[tuple[str, int, Tensor]], ids: Mapping[str, Ids]) -> dict[str, Tensor]:
    """Rows (X, ...) of tables that lie in parts (table, first row, rows), by their numbers,
    ascending (X)."""
    found: dict[str, list[Tensor]] = {}
    for name, first, rows in sorted(parts, key=lambda part: part[1]):
        if name in ids:
            low, high = np.searchsorted(ids[name], (first, first + len(rows)))
            found.setdefault(name, []).append(rows[torch.from_numpy(ids[name][low:high] - first)])
    return {name: torch.cat(chosen) for name, chosen in found.items()}


def ids_of(
    stream: EventStream,
    window: Window,
    domain: str,
    tables: Sequence[str],
) -> dict[str, Ids]:
    """The rows of each table that a window's examples of a domain read, ascending; tables that none
    reads are left out."""
    schema = stream.schema
    index = stream.schema.domain_index(domain)
    first = dict(zip(schema.tables, np.cumsum([0, *schema.tables.values()]).tolist(), strict=False))
    used_R = np.zeros(sum(schema.tables.values()), bool)
    single_S = np.array([first[f.table or f.name] for f in schema.single])
    for rows in _rows_of(stream, window, index):
        used_R[list_values(rows["sparse"], len(single_S)) + single_S] = True
        for bag in schema.bags:
            used_R[
                rows[bag.name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                + first[bag.table or bag.name]
            ] = True
    found = {
        name: np.flatnonzero(used_R[first[name] : first[name] + schema.tables[name]])
        for name in tables
    }
    return {name: id_X for name, id_X in found.items() if len(id_X)}


def _rows_of(
    stream: EventStream,
    window: Window,
    domain: int,
) -> Iterator[pa.Table]:
    columns = ["domain", "sparse", *(bag.name for bag in stream.schema.bags)]
    for fragment in window.fragments:
        if fragment.domain_rows[domain]:
            rows = stream.read(window.index, fragment, columns)
            yield rows.filter(pc.equal(rows["domain"], domain))
