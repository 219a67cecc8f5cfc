"""Files that are whole or absent: every write goes to a temporary name beside its target and is
renamed; a remote file is put in one step."""

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
    """Yield a temporary path in `path`'s folder; rename it to `path` when the block ends without an
    error. Of a remote file the temporary one lies on this machine."""
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="exfm-ray.") as folder:
            yield Path(folder) / path.name
            path.upload(Path(folder) / path.name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{path.name}.{uuid.uuid4().hex}.tmp"
    )  # threads, and other nodes, may write the same file
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
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: AnyPath) -> Any:
    """The JSON value in `path`; UserError where the file is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # not JSON, not text, or nested without end
        raise UserError(
            f"{path}: not valid JSON ({error}); remove it and run the step that writes it again"
        ) from None


def parquet_source(path: AnyPath) -> Any:
    """What pyarrow reads a Parquet file from: a local one where it lies, a remote one from memory,
    fetched whole in one go."""
    if isinstance(path, Path):
        return path
    import pyarrow as pa

    return pa.BufferReader(path.read_bytes())


def remove_tree(folder: AnyPath) -> None:
    """Delete all below a folder, and a local one itself. What is not there is no error."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.remove_tree()


def append_jsonl(path: Path, rows: Sequence[Any]) -> None:
    """Append a line of JSON for each row, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def append_text(path: Path, line: str) -> None:
    """Append a line to a log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line + "\n")


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a file of JSON lines; a last line that is not whole (being written, or cut short
    by a kill) is left out.

    UserError where a line before it is damaged.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    rows = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: line {number} is damaged ({error}); remove the line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is no JSON object; remove the line")
        rows.append(row)
    return rows


def truncate_partial_line(path: Path) -> None:
    """Cut off a last line that a kill cut short, or the next row would be glued to it."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def short_hash(value: Any) -> str:
    """A short stable digest of a JSON-able value: 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
