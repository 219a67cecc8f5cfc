"""What all stores of a teacher's windows have in common.

<root>/<teacher>/window=003/                 the window's files
<root>/<teacher>/window=003/manifest.json    written last: it makes the window visible
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from exfm_ray.base import FrozenModel
from exfm_ray.data.stream import window_name
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import write_json
from exfm_ray.storage.manifest import read_manifest
from exfm_ray.storage.remote import AnyPath


class WindowManifest(FrozenModel):
    """The fields that every window's manifest has.

    Attributes:
        window: index of the window.
        teacher: name of the teacher whose snapshot made the window's files.
        snapshot: version of that snapshot.
    """

    window: int
    teacher: str
    snapshot: int


M = TypeVar("M", bound=WindowManifest)


@dataclass(frozen=True)
class WindowStore:
    """Files that one teacher's snapshots made for a stream, one folder per window."""

    root: AnyPath
    teacher: str

    contents: ClassVar[str]
    """What a window's folder holds, for error messages."""

    def folder(self, window: int) -> AnyPath:
        """Return the folder of a window's files."""
        return self.root / self.teacher / window_name(window)

    def has(self, window: int) -> bool:
        """Return True if the window is committed."""
        return self._manifest_path(window).exists()

    def rebuild_hint(self, window: int) -> str:
        """Return what a user can do about a window whose files are damaged or stale."""
        return f"remove {self.folder(window)} and run the DAS again"

    def _manifest_path(self, window: int) -> AnyPath:
        return self.folder(window) / "manifest.json"

    def _read_manifest(self, window: int, kind: type[M]) -> M:
        """Read a committed window's manifest.

        Raises:
            UserError: the manifest is missing, damaged, or of another window or teacher.
        """
        path = self._manifest_path(window)
        if not path.exists():
            raise UserError(
                f"{path}: window {window} has no committed {self.contents} of teacher "
                f"'{self.teacher}'; run the DAS on it"
            )

        hint = self.rebuild_hint(window)
        manifest = read_manifest(path, kind, f"a manifest of {self.contents}", hint)
        if (manifest.window, manifest.teacher) != (window, self.teacher):
            raise UserError(
                f"{path}: is of window {manifest.window} and teacher '{manifest.teacher}'; {hint}"
            )
        return manifest

    def _write_manifest(self, manifest: WindowManifest) -> None:
        """Make a window visible."""
        write_json(self._manifest_path(manifest.window), manifest.model_dump(mode="json"))
