"""Published snapshots of the FM.

`<store>/<teacher>/version=003/` holds a stored model (`models.stored`) whose facts are the teacher's name, the version
(see `das.lag`) and the run's seed.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from exfm_ray.errors import UserError
from exfm_ray.models.stored import MANIFEST, PlainModel, load_model, read_manifest


@dataclass(frozen=True)
class SnapshotStore:
    """The snapshots of one teacher."""

    root: Path
    teacher: str

    def folder(self, version: int) -> Path:
        """Where a version lies."""
        return self.root / self.teacher / f"version={version:03d}"

    def has(self, version: int) -> bool:
        """True when the version is published whole."""
        return (self.folder(version) / MANIFEST).exists()

    def versions(self) -> list[int]:
        """Published versions, oldest first."""
        found = (self.root / self.teacher).glob(f"version=*/{MANIFEST}")
        return sorted(int(path.parent.name.removeprefix("version=")) for path in found)

    def load(self, version: int, schema_digest: str) -> tuple[PlainModel, tuple[str, ...]]:
        """Model and its tasks, on the CPU; UserError when it is not what its name says or was trained on another schema."""
        folder = self.folder(version)
        if not self.has(version):
            raise UserError(f"{folder}: snapshot {version} of teacher '{self.teacher}' is not published; train the FM further")
        model, manifest = load_model(folder)
        if manifest.facts.get("teacher") != self.teacher or manifest.facts.get("version") != version:
            raise UserError(f"{folder / MANIFEST}: names {manifest.facts}, not version {version} of teacher '{self.teacher}'")
        if manifest.example.digest != schema_digest:
            raise UserError(f"{folder}: this snapshot was trained on another schema than the stream's; train the FM on this stream")
        return model, manifest.tasks

    def tasks(self, version: int) -> tuple[str, ...]:
        """Tasks that a published version predicts."""
        return read_manifest(self.folder(version)).tasks

    def remove_before(self, version: int) -> None:
        """Delete versions that no window will need any more."""
        for old in self.versions():
            if old < version:
                self.remove(old)

    def remove(self, version: int) -> None:
        """Delete a version; a kill in the middle leaves none that is only half there."""
        (self.folder(version) / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.folder(version), ignore_errors=True)
