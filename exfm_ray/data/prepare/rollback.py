"""What a killed or failed preparation leaves behind, and how it is removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import remove_tree
from exfm_ray.storage.remote import AnyPath, StorageError


def remove_uncommitted(root: AnyPath) -> None:
    """Remove what a killed preparation left unfinished. Committed windows stay."""
    # List the folders first: one that another preparation commits meanwhile must stay.
    folders: list[AnyPath] = list(root.glob("window=*"))
    committed = {path.parent for path in root.glob("window=*/manifest.json")}
    for folder in folders:
        if folder not in committed:
            remove_tree(folder)
    if not isinstance(root, Path):
        return  # remote files are written in one step
    for pattern in (".*.tmp", "*/.*.tmp", "*/*/.*.tmp"):
        for temporary in list(root.glob(pattern)):
            temporary.unlink()


@contextmanager
def rollback_on_error(root: AnyPath) -> Iterator[None]:
    """Roll back this run's files on a UserError, because the raw data will be corrected and
    prepared again. On a StorageError keep them, so that the next run can resume."""
    before: set[AnyPath] = set(root.rglob("*"))
    try:
        yield
    except StorageError:
        raise
    except UserError:
        after: set[AnyPath] = set(root.rglob("*"))
        written = sorted(after - before, key=str, reverse=True)
        for path in written:
            _remove(path)
        if isinstance(root, Path) and root.is_dir() and not before:
            root.rmdir()
        raise


def _remove(path: AnyPath) -> None:
    """Remove a file or an empty folder."""
    if isinstance(path, Path) and path.is_dir():
        path.rmdir()
    else:
        path.unlink()
