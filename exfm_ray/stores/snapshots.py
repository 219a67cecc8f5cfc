"""Published snapshots of the FM.

`<store>/<teacher>/version=003/` holds a stored model (`models.stored`) whose facts are the
teacher's name, the version (see `das.lag`) and the run's seed.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """A snapshot that must not be scored with."""


@dataclass(frozen=True)
class SnapshotStore:
    """The snapshots of one teacher."""

    root: AnyPath
    teacher: str

    @classmethod
    def from_config(cls, config: Config, teacher: str | None = None) -> Self:
        """Those of a run's FM, or of another of its teachers: another run's, or made in this
        one."""
        name = teacher or config.fm.name
        elsewhere = next((other.run for other in config.teachers if other.name == name), None)
        return cls(
            (store_root_of_run(elsewhere) if elsewhere else config.stores) / "snapshots", name
        )

    def folder(self, version: int) -> AnyPath:
        """Where a version lies."""
        return self.root / self.teacher / f"version={version:03d}"

    def has(self, version: int) -> bool:
        """True when the version is published whole."""
        return (self.folder(version) / MANIFEST).exists()

    def versions(self) -> list[int]:
        """Published versions, oldest first."""
        found = (self.root / self.teacher).glob(f"version=*/{MANIFEST}")
        return sorted(int(path.parent.name.removeprefix("version=")) for path in found)

    def manifest(self, version: int, schema: Schema) -> StoredModel:
        """The manifest of a version, with the checks of `load` but for the files' hashes; its error
        says what is otherwise in its schema."""
        folder = self._published(version)
        manifest = read_stored_model(folder)
        if manifest.example.digest != schema.digest:
            raise SnapshotError(
                f"{folder}: this snapshot was trained on another schema than the stream's: {schema.difference(manifest.example)}; "
                "train its model on this stream"
            )
        self._check(version, manifest, schema.digest)
        return manifest

    def tables(self, version: int, schema: Schema) -> Iterator[tuple[str, int, Tensor]]:
        """A version's tables in parts (`table_parts`), with the checks of `load`."""
        self.manifest(version, schema)
        checked_manifest(self.folder(version))
        return table_parts(self.folder(version))

    def load(self, version: int, schema_digest: str) -> tuple[LocalModel, tuple[str, ...]]:
        """Model and its tasks, on the CPU; SnapshotError when it is damaged, not what its name says
        or of another schema."""
        folder = self._published(version)
        try:
            model, manifest = load_model(folder)
        except StorageError:
            raise
        except UserError as error:
            raise SnapshotError(str(error)) from None
        self._check(version, manifest, schema_digest)
        return model, manifest.tasks

    def load_dense(self, version: int, schema_digest: str) -> tuple[Network, StoredModel]:
        """The network and the manifest, with the checks of `load`, of a version whose tables others
        hold."""
        folder = self._published(version)
        try:
            manifest = checked_manifest(folder)
        except StorageError:
            raise
        except UserError as error:
            raise SnapshotError(str(error)) from None
        self._check(version, manifest, schema_digest)
        return load_network(folder, manifest).eval(), manifest

    def _published(self, version: int) -> AnyPath:
        if not self.has(version):
            raise SnapshotError(
                f"{self.folder(version)}: snapshot {version} of teacher '{self.teacher}' is not published; train the FM further"
            )
        return self.folder(version)

    def _check(
        self,
        version: int,
        manifest: StoredModel,
        schema_digest: str,
    ) -> None:
        folder = self.folder(version)
        if (
            manifest.facts.get("teacher") != self.teacher
            or manifest.facts.get("version") != version
        ):
            raise SnapshotError(
                f"{folder / MANIFEST}: names {manifest.facts}, not version {version} of teacher '{self.teacher}'"
            )
        if manifest.example.digest != schema_digest:
            raise SnapshotError(
                f"{folder}: this snapshot was trained on another schema than the stream's; train the FM on this stream"
            )

    def published_s(self, version: int) -> float:
        """When a version was published, in seconds since the epoch."""
        return (self.folder(version) / MANIFEST).stat().st_mtime

    def momentum(self, version: int) -> dict[str, Tensor]:
        """Adagrad state of a version's tables, float32 (rows) by name; empty where it was published
        without."""
        return whole_tables(self.folder(version), MOMENTUM)

    def tasks(self, version: int) -> tuple[str, ...]:
        """Tasks that a published version predicts."""
        return read_stored_model(self.folder(version)).tasks

    def remove_before(self, version: int) -> None:
        """Delete versions that no window will need any more."""
        for old in self.versions():
            if old < version:
                self.remove(old)

    def remove(self, version: int) -> None:
        """Delete a version; a kill in the middle leaves none that is only half there."""
        (self.folder(version) / MANIFEST).unlink(missing_ok=True)
        remove_tree(self.folder(version))


def rebuild_hint(folder: AnyPath) -> str:
    """The way out of an error about a window's `folder`: only the snapshot that made it can make it
    again."""
    return f"with das.keep_snapshots=true from the start: remove {folder} and run the DAS again; without: start a run under another --name"
