"""Atomic file writes and readers that name a damaged file.

A file is complete or absent: every write goes to a temporary name beside its target and is then
renamed. A remote file is uploaded in one step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exfm_ray.errors import UserError
from exfm_ray.storage.remote import AnyPath, RemotePath


@contextmanager
def atomic_path(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary path; move it to `path` when the block ends without an error.

    The temporary file lies in `path`'s folder, or on this machine if `path` is remote.
    """
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="exfm-ray.") as folder:
            local = Path(folder, path.name)
            yield local
            path.upload(local)
        return

    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is unique: other threads and nodes may write the same file at the same time.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: AnyPath, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: AnyPath, value: Any) -> None:
    """Write `value` as JSON to `path` atomically."""
    text = json.dumps(value, indent=1)
    write_text(path, text + "\n")


def read_json(path: AnyPath) -> Any:
    """Return the JSON value in `path`.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # not JSON, not text, nested too deeply
        raise UserError(
            f"{path}: not valid JSON ({error}); remove it and run the step that writes it again"
        ) from None


def parquet_source(path: AnyPath) -> Any:
    """Return what pyarrow reads a Parquet file from.

    That is the path of a local file, or the bytes of a remote one, downloaded in one request.
    """
    if isinstance(path, Path):
        return path
    import pyarrow as pa

    return pa.BufferReader(path.read_bytes())


def remove_tree(folder: AnyPath) -> None:
    """Delete a folder and everything below it. A missing folder is no error."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.remove_tree()


def append_jsonl(path: Path, rows: Sequence[Any]) -> None:
    """Append one line of JSON per row, all in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
    with path.open("a") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def append_text(path: Path, line: str) -> None:
    """Append one line to a text file, such as a log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line + "\n")


def read_jsonl(path: Path) -> list[Any]:
    """Return the rows of a file of JSON lines; a missing file has none.

    An incomplete last line (being written, or cut off by a kill) is left out.

    Raises:
        UserError: a line before the last one is damaged.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse_row(line, f"{path}: line {number}")
        rows.append(row)
    return rows


def _parse_row(line: bytes, where: str) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({error}); remove the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; remove the line")
    return row


def truncate_partial_line(path: Path) -> None:
    """Remove an incomplete last line, which a kill left; the next row would be joined to it."""
    if path.exists():
        data = path.read_bytes()
        complete_bytes = data.rfind(b"\n") + 1
        os.truncate(path, complete_bytes)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def short_hash(value: Any) -> str:
    """Return a short stable digest of a JSON-able value: 16 hex digits."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
