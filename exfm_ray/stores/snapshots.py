"""Published snapshots of a teacher.

`<store>/<teacher>/version=003/` holds a stored model (`models.serialization`). Its facts are the
teacher's name, the version (see `stores.snapshot_policy`) and the run's seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from exfm_ray.config.root import Config
from exfm_ray.errors import UserError
from exfm_ray.models.network import Network
from exfm_ray.models.serialization import (
    MANIFEST,
    MOMENTUM,
    LocalModel,
    StoredModel,
    checked_manifest,
    load_model,
    load_network,
    read_stored_model,
    table_parts,
    whole_tables,
)
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import remove_tree
from exfm_ray.storage.paths import store_root_of_run
from exfm_ray.storage.remote import AnyPath, StorageError


class SnapshotError(UserError):
    """A snapshot that must not be scored with: damaged, misnamed, or of another schema."""


@contextmanager
def snapshot_errors() -> Iterator[None]:
    """Turn a `UserError` of the block into a `SnapshotError`; a `StorageError` stays one."""
    try:
        yield
    except StorageError:
        raise
    except UserError as error:
        raise SnapshotError(str(error)) from None


@dataclass(frozen=True)
class SnapshotStore:
    """The snapshots of one teacher."""

    root: AnyPath
    teacher: str

    @classmethod
    def from_config(cls, config: Config, teacher: str | None = None) -> Self:
        """Return the snapshots of a run's FM, or of another of its teachers.

        The other teacher may belong to another run or be a vertical model of this run.
        """
        name = teacher or config.fm.name
        other_runs = {other.name: other.run for other in config.teachers}
        other_run = other_runs.get(name)
        stores = store_root_of_run(other_run) if other_run else config.stores
        return cls(stores / "snapshots", name)

    def folder(self, version: int) -> AnyPath:
        """Return the folder of a version."""
        return self.root / self.teacher / f"version={version:03d}"

    def has(self, version: int) -> bool:
        """Return True if the version is completely published."""
        return (self.folder(version) / MANIFEST).exists()

    def versions(self) -> list[int]:
        """Return the published versions, oldest first."""
        folder = self.root / self.teacher
        names = [path.parent.name for path in folder.glob(f"version=*/{MANIFEST}")]
        return sorted(int(name.removeprefix("version=")) for name in names)

    def manifest(self, version: int, schema: Schema) -> StoredModel:
        """Return a version's manifest, checked like `load`, except for the hashes of the files.

        Raises:
            SnapshotError: as `load`; for another schema it says what differs.
        """
        folder = self._published(version)
        manifest = read_stored_model(folder)
        if manifest.example.digest != schema.digest:
            difference = schema.difference(manifest.example)
            raise SnapshotError(
                f"{folder}: this snapshot was trained on another schema than the stream's: "
                f"{difference}; train its model on this stream"
            )
        self._check(version, manifest, schema.digest)
        return manifest

    def tables(self, version: int, schema: Schema) -> Iterator[tuple[str, int, Tensor]]:
        """Return a version's tables in parts (see `table_parts`), with the checks of `load`."""
        folder = self.folder(version)
        self.manifest(version, schema)
        checked_manifest(folder)
        return table_parts(folder)

    def load(self, version: int, schema_digest: str) -> tuple[LocalModel, tuple[str, ...]]:
        """Load a version on the CPU and check it.

        Returns:
            The model, and the tasks that it predicts.

        Raises:
            SnapshotError: the version is not published, damaged, of another teacher or version
                than its folder says, or of another schema.
        """
        folder = self._published(version)
        with snapshot_errors():
            model, manifest = load_model(folder)
        self._check(version, manifest, schema_digest)
        return model, manifest.tasks

    def load_dense(self, version: int, schema_digest: str) -> tuple[Network, StoredModel]:
        """Load the network without its tables, which other processes hold. Checks as in `load`."""
        folder = self._published(version)
        with snapshot_errors():
            manifest = checked_manifest(folder)
        self._check(version, manifest, schema_digest)
        return load_network(folder, manifest).eval(), manifest

    def _published(self, version: int) -> AnyPath:
        if not self.has(version):
            raise SnapshotError(
                f"{self.folder(version)}: snapshot {version} of teacher '{self.teacher}' is not "
                "published; train the FM further"
            )
        return self.folder(version)

    def _check(
        self,
        version: int,
        manifest: StoredModel,
        schema_digest: str,
    ) -> None:
        folder = self.folder(version)
        facts = manifest.facts
        if (facts.get("teacher"), facts.get("version")) != (self.teacher, version):
            raise SnapshotError(
                f"{folder / MANIFEST}: names {facts}, "
                f"not version {version} of teacher '{self.teacher}'"
            )
        if manifest.example.digest != schema_digest:
            raise SnapshotError(
                f"{folder}: this snapshot was trained on another schema than the stream's; "
                "train the FM on this stream"
            )

    def published_s(self, version: int) -> float:
        """Return when a version was published, in seconds since the epoch."""
        path = self.folder(version) / MANIFEST
        return path.stat().st_mtime

    def momentum(self, version: int) -> dict[str, Tensor]:
        """Return the Adagrad state of a version's tables, float32 (rows) by table name.

        It is empty if the version was published without it.
        """
        return whole_tables(self.folder(version), MOMENTUM)

    def tasks(self, version: int) -> tuple[str, ...]:
        """Return the tasks that a published version predicts."""
        return read_stored_model(self.folder(version)).tasks

    def remove_before(self, version: int) -> None:
        """Delete the versions older than `version`."""
        for old in self.versions():
            if old < version:
                self.remove(old)

    def remove(self, version: int) -> None:
        """Delete a version. A kill in the middle leaves no version that looks published."""
        folder = self.folder(version)
        (folder / MANIFEST).unlink(missing_ok=True)
        remove_tree(folder)


def rebuild_hint(folder: AnyPath) -> str:
    """Return the way out of an error about a window's `folder` that was derived from a snapshot.

    Only the snapshot that made it can make it again.
    """
    return (
        f"with das.keep_snapshots=true from the start: remove {folder} and run the DAS again; "
        "without: start a run under another --name"
    )
