"""Rows of the teacher's tables that vertical models take over, by window and domain.

    <store>/<teacher>/window=003/<domain>.safetensors
        ids/<table>       int64 (X), the rows' numbers, ascending
        rows/<table>      float32 (X, W)
        momentum/<table>  float32 (X), the Adagrad state; only if the snapshot holds it
    <store>/<teacher>/window=003/manifest.json   written last

The rows are of the snapshot that supervises the window, so they know nothing of it (rule 2). Each
window stores only the rows that its examples read, so it is a small delta.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exfm_ray.base import FrozenModel
from exfm_ray.config.root import Config
from exfm_ray.data.stream import EventStream, Window, list_values
from exfm_ray.errors import UserError
from exfm_ray.models.serialization import MOMENTUM, table_parts
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import atomic_path, sha256
from exfm_ray.storage.cache import local_copy, verify_sha256
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.base import WindowManifest, WindowStore
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore, rebuild_hint

Ids = np.ndarray[Any, np.dtype[np.int64]]
TablePart = tuple[str, int, Tensor]
"""A part of a table: the table's name, the number of its first row, its rows (X, ...)."""


class TableRows(NamedTuple):
    """Some rows of one table.

    Attributes:
        id_X: the rows' numbers, int64, ascending.
        row_XW: the rows, float32.
        momentum_X: their Adagrad state, float32; None if it was not published.
    """

    id_X: Ids
    row_XW: Tensor
    momentum_X: Tensor | None


class DomainFile(FrozenModel):
    """The file with one domain's rows."""

    file: str
    sha256: str
    rows: int
    bytes: int


class SharedRowsManifest(WindowManifest):
    """The manifest of a window's rows.

    Attributes:
        schema_digest: digest of the stream's schema.
        widths: W of each table.
        momentum: True if the tables' Adagrad state is published, too.
        domains: the file of each domain.
        asked: the damaged version that `snapshot` replaced as a fallback, None if it replaced none.
    """

    schema_digest: str
    widths: dict[str, int]
    momentum: bool
    domains: dict[str, DomainFile]
    asked: int | None = None


@dataclass(frozen=True)
class SharedStore(WindowStore):
    """The rows that one teacher shares."""

    contents: ClassVar[str] = "shared rows"

    def rebuild_hint(self, window: int) -> str:
        """Return what a user can do about a window whose rows are damaged or stale."""
        return rebuild_hint(self.folder(window))

    def manifest(self, window: int) -> SharedRowsManifest:
        """Read the manifest of a committed window.

        Raises:
            UserError: it is missing, damaged, or of another window or teacher.
        """
        return self._read_manifest(window, SharedRowsManifest)

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
        """Write the rows that a window's examples of each domain read.

        Args:
            stream: the stream.
            window: the window.
            snapshots: the teacher's snapshots.
            version: the snapshot whose rows are written, with their Adagrad state if it holds it.
            domains: names of the domains.
            tables: names of the tables; empty for all tables.
            policy: the settings' policy.

        Raises:
            UserError: the snapshot may have learned from the window (rule 2).
        """
        policy.refuse_later_snapshot(version, window.index, "given rows of")
        schema = stream.schema
        published = [name for name in schema.tables if name in tables or not tables]
        # The files are mapped into memory: only the rows that are published are really read, so
        # the teacher may be larger than this process.
        weights = list(snapshots.tables(version, schema))
        momentum = list(table_parts(snapshots.folder(version), MOMENTUM))

        files = {}
        for domain in domains:
            ids = ids_of(stream, window, domain, published)
            path = self.folder(window.index) / f"{domain}.safetensors"
            files[domain] = _write_domain(path, ids, weights, momentum)

        widths = {name: rows.shape[1] for name, _, rows in weights}
        self._write_manifest(
            SharedRowsManifest(
                window=window.index,
                teacher=self.teacher,
                snapshot=version,
                schema_digest=schema.digest,
                momentum=bool(momentum),
                domains=files,
                widths={name: widths[name] for name in published},
                asked=policy.replaced_version(version, window.index),
            )
        )

    def read(
        self,
        window: int,
        domain: str,
        schema: Schema,
        policy: SnapshotPolicy,
    ) -> dict[str, TableRows]:
        """Read a domain's rows, by table.

        Raises:
            UserError: the window is not committed, its file is damaged, or it is of another
                window, teacher, snapshot or schema.
        """
        manifest = self.manifest(window)
        folder = self.folder(window)
        hint = self.rebuild_hint(window)
        if not policy.accepts(manifest.snapshot, manifest.asked, window):
            raise UserError(
                f"{folder}: rows of snapshot {manifest.snapshot}, das.fm_lag = {policy.fm_lag} "
                f"asks for {policy.version(window)}; {hint}"
            )
        if manifest.schema_digest != schema.digest:
            raise UserError(
                f"{folder}: its rows are numbered by another schema (other features, rows or "
                f"encodings) than the stream's; {hint}"
            )
        if domain not in manifest.domains:
            domains = ", ".join(manifest.domains) or "none"
            raise UserError(f"{folder}: no rows for domain '{domain}', only for {domains}; {hint}")

        file = manifest.domains[domain]
        path = folder / file.file
        is_inside = PurePath(file.file).name == file.file
        if not is_inside or not verify_sha256(path, file.sha256):
            raise UserError(f"{path}: missing or not the file that its manifest describes; {hint}")
        return _read_domain(path, file, manifest.widths)


def _write_domain(
    path: AnyPath,
    ids: Mapping[str, Ids],
    weights: Sequence[TablePart],
    momentum: Sequence[TablePart],
) -> DomainFile:
    tensors = {f"ids/{name}": torch.from_numpy(id_X) for name, id_X in ids.items()}
    for name, row_XW in rows_of(weights, ids).items():
        tensors[f"rows/{name}"] = row_XW
    for name, momentum_X in rows_of(momentum, ids).items():
        tensors[f"momentum/{name}"] = momentum_X

    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
        digest = sha256(temporary)
        size = temporary.stat().st_size
    rows = sum(len(id_X) for id_X in ids.values())
    return DomainFile(file=path.name, sha256=digest, rows=rows, bytes=size)


def _read_domain(
    path: AnyPath,
    file: DomainFile,
    tables: Iterable[str],
) -> dict[str, TableRows]:
    tensors = load_file(local_copy(path, file.sha256))
    rows = {}
    for name in tables:
        id_X = tensors.get(f"ids/{name}")
        if id_X is not None:
            row_XW = tensors[f"rows/{name}"]
            momentum_X = tensors.get(f"momentum/{name}")
            rows[name] = TableRows(id_X.numpy(), row_XW, momentum_X)
    return rows


def shared_store(config: Config, teacher: str | None = None) -> SharedStore | None:
    """Return the rows of a run's FM, or of another of its teachers; None if no arm uses them."""
    if not any(arm.shares_tables for arm in config.arms):
        return None
    name = teacher or config.fm.name
    return SharedStore(config.stores / "shared", name)


def rows_of(parts: Sequence[TablePart], ids: Mapping[str, Ids]) -> dict[str, Tensor]:
    """Gather rows of tables that lie in parts.

    Args:
        parts: parts of tables, in any order.
        ids: table -> numbers of its rows (X), ascending.

    Returns:
        Table -> rows (X, ...).
    """
    chunks: dict[str, list[Tensor]] = {}
    for name, first, rows in sorted(parts, key=lambda part: part[1]):
        if name not in ids:
            continue
        id_X = ids[name]
        end = first + len(rows)
        low, high = np.searchsorted(id_X, (first, end))
        local_Y = torch.from_numpy(id_X[low:high] - first)
        chunks.setdefault(name, [])
        chunks[name].append(rows[local_Y])
    return {name: torch.cat(table_chunks) for name, table_chunks in chunks.items()}


def ids_of(
    stream: EventStream,
    window: Window,
    domain: str,
    tables: Sequence[str],
) -> dict[str, Ids]:
    """Return the rows of each table that a window's examples of a domain read, ascending.

    Tables of which no row is read are left out.
    """
    schema = stream.schema
    sizes = schema.tables
    # One mask over the rows of all tables, one table after the other (R).
    total = sum(sizes.values())
    is_used_R = np.zeros(total, bool)
    starts = np.cumsum([0, *sizes.values()]).tolist()
    first_row = dict(zip(sizes, starts, strict=False))

    tables_S = [feature.table or feature.name for feature in schema.single]
    first_S = np.array([first_row[table] for table in tables_S])
    for rows in _rows_of_domain(stream, window, schema.domain_index(domain)):
        id_BS = list_values(rows["sparse"], len(first_S))
        is_used_R[id_BS + first_S] = True
        for bag in schema.bags:
            first = first_row[bag.table or bag.name]
            values = rows[bag.name].combine_chunks().flatten()
            id_V = values.to_numpy(zero_copy_only=False)
            is_used_R[id_V + first] = True

    ids = {}
    for name in tables:
        start = first_row[name]
        end = start + sizes[name]
        id_X = np.flatnonzero(is_used_R[start:end])
        if len(id_X):
            ids[name] = id_X
    return ids


def _rows_of_domain(
    stream: EventStream,
    window: Window,
    domain: int,
) -> Iterator[pa.Table]:
    columns = ["domain", "sparse", *(bag.name for bag in stream.schema.bags)]
    for fragment in window.fragments:
        if fragment.domain_rows[domain]:
            rows = stream.read(window.index, fragment, columns)
            is_in_domain = pc.equal(rows["domain"], domain)
            yield rows.filter(is_in_domain)
