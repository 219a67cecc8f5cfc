"""Files on a remote file system, named by a URL.

`RemotePath` offers the part of pathlib that the stores of a run need, on top of pyarrow's file
systems. S3 and Google Cloud Storage are built into pyarrow; any other scheme is opened by fsspec.
Every upload is atomic: an object of S3 or GCS appears when its upload is complete; elsewhere a file
is written under another name and moved. Credentials come from the environment alone.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qs, urlsplit

from exfm_ray.errors import UserError

OBJECT_STORES = {
    "s3": "S3 (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)",
    "gs": "Google Cloud (GOOGLE_APPLICATION_CREDENTIALS)",
}
"""Schemes of object stores, whose uploads are atomic, with the source of their credentials."""
OPTIONS = {"s3": {"region", "endpoint_override", "scheme"}, "gs": {"endpoint_override", "scheme"}}
"""Options that may follow the `?` of their URLs."""
PROBE_ATTEMPTS = 3
MAX_ATTEMPTS = 8
"""Attempts per request, with pauses that double from half a second.

The first request has few, because an error there is most likely a mistake in the settings; later
requests are retried for about 40 s in all.
"""
CONNECT_TIMEOUT_S = 10.0
GCS_RETRY_S = 60.0
POLL_S = 1.0
"""Shortest pause between two polls of remote storage."""


class StorageError(UserError):
    """A remote file system could not be used, so the state of the file is unknown."""


def check_url(url: str) -> str:
    """Return the URL if it can be used.

    Raises:
        ValueError: it is not a URL, holds credentials, or has a scheme that no installed file
            system reads.
    """
    parts = urlsplit(url)
    if "://" not in url or not parts.scheme:
        raise ValueError(
            "is not a URL; write it as s3://bucket/prefix, "
            "or remove it: without it everything lies below run.dir"
        )
    is_object_store = parts.scheme in OBJECT_STORES
    if parts.password or (parts.username and is_object_store):
        source = f", for {OBJECT_STORES[parts.scheme]}" if is_object_store else ""
        raise ValueError(
            "holds credentials, which would be written into the run's folder; "
            f"put them into the environment of all nodes{source}"
        )
    _check_options(parts)
    if not is_object_store:
        _check_installed(parts.scheme)
    elif not parts.netloc:
        raise ValueError(f"names no bucket; write it as {parts.scheme}://bucket/prefix")
    return url


def _check_options(parts: SplitResult) -> None:
    options = parse_qs(parts.query)
    allowed = OPTIONS.get(parts.scheme, set())
    unknown = sorted(options.keys() - allowed)
    if unknown:
        known = ", ".join(sorted(allowed)) or "none"
        raise ValueError(
            f"has the option '{unknown[0]}'; known for '{parts.scheme}': {known}",
        )
    for values in options.values():
        holds_user = any("@" in value for value in values)
        if holds_user:
            raise ValueError(
                "holds credentials in an option; put them into the environment of all nodes"
            )


def _check_installed(scheme: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"no file system for '{scheme}' is installed ({error}); s3 and gs are built in"
        ) from None


def redact_url(url: str) -> str:
    """Return a URL as it may be shown: without user, password and options."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    without_options = rest.partition("?")[0]
    without_user = without_options.rpartition("@")[2]
    return f"{scheme}://{without_user}"


class _Connection(NamedTuple):
    """An open file system.

    Attributes:
        system: for all requests.
        probe: the same file system with fewer attempts, for the first request.
        base: the URL's path on it.
    """

    system: Any
    probe: Any
    base: str


@lru_cache(maxsize=8)
def open_filesystem(url: str) -> tuple[Any, str]:
    """Return the file system of a checked URL, and the URL's path on it.

    Raises:
        UserError: the file system does not answer the first request, or its bucket does not exist.
    """
    from pyarrow.fs import FileType

    parts = urlsplit(url)
    shown = redact_url(url)
    is_object_store = parts.scheme in OBJECT_STORES
    try:
        connection = _connect(url, parts)
        probed_path = parts.netloc if is_object_store else connection.base
        info = connection.probe.get_file_info(probed_path)
    except OSError as error:
        credentials = OBJECT_STORES.get(parts.scheme, parts.scheme)
        raise StorageError(
            f"setting 'run.storage': {shown} cannot be reached ({_first_line(error)}); "
            f"does the environment of this process hold credentials for {credentials}, "
            "may they list the bucket, and is the address right?"
        ) from None
    if is_object_store and info.type is FileType.NotFound:
        raise UserError(
            f"setting 'run.storage': {shown}: there is no bucket '{parts.netloc}'; "
            "create it, or correct the name"
        )
    return connection.system, connection.base


def _connect(url: str, parts: SplitResult) -> _Connection:
    from pyarrow import fs

    base = f"{parts.netloc}{parts.path}".rstrip("/")
    if parts.scheme == "s3":
        probe = _s3(parts, PROBE_ATTEMPTS)
        return _Connection(_s3(parts, MAX_ATTEMPTS), probe, base)
    if parts.scheme == "gs":
        retry_limit = timedelta(seconds=GCS_RETRY_S)
        system = fs.GcsFileSystem(retry_time_limit=retry_limit, **_options(parts))
        return _Connection(system, system, base)

    import fsspec

    filesystem, base = fsspec.url_to_fs(url, use_listings_cache=False)
    system = fs.PyFileSystem(fs.FSSpecHandler(filesystem))
    return _Connection(system, system, base)


def _options(parts: SplitResult) -> dict[str, str]:
    options = parse_qs(parts.query)
    return {name: values[-1] for name, values in options.items()}


def _s3(parts: SplitResult, attempts: int) -> Any:
    """Open S3 with the endpoint and region of the URL, else of the environment.

    Without either the endpoint is Amazon's, and the region the bucket's.
    """
    from pyarrow import fs

    options = _options(parts)
    # pyarrow itself does not read these variables.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_override" not in options:
        scheme, _, address = endpoint.rstrip("/").rpartition("://")
        options["endpoint_override"] = address
        options.setdefault("scheme", scheme or "https")

    if "region" not in options:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if not region and "endpoint_override" in options:
            region = "us-east-1"
        options["region"] = region or fs.resolve_s3_region(parts.netloc)
    return fs.S3FileSystem(
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        connect_timeout=CONNECT_TIMEOUT_S,
        allow_delayed_open=True,
        **options,
    )


def _first_line(error: OSError) -> str:
    lines = str(error).splitlines()
    return lines[0]


@dataclass(frozen=True)
class Stat:
    """Size and modification time of a file, named as in `os.stat_result`."""

    st_size: int
    st_mtime: float
    st_mtime_ns: int


@dataclass(frozen=True)
class RemotePath:
    """A file, or a prefix of files, on a remote file system.

    As with pathlib, a missing file is a FileNotFoundError. Any other failure is a StorageError.

    Attributes:
        root: a URL that `check_url` has accepted.
        parts: the names below it.
    """

    root: str
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        root = redact_url(self.root).rstrip("/")
        return "/".join([root, *self.parts])

    def __truediv__(self, below: str) -> RemotePath:
        parts = below.split("/")
        if ".." in parts:
            raise UserError(f"{self}: '{below}' does not lie below it")
        return RemotePath(self.root, (*self.parts, *parts))

    @property
    def name(self) -> str:
        """The last part, empty for the root itself."""
        if not self.parts:
            return ""
        return self.parts[-1]

    @property
    def parent(self) -> RemotePath:
        """The path without its last part."""
        return RemotePath(self.root, self.parts[:-1])

    def with_name(self, name: str) -> RemotePath:
        """Return the path of another file in the same parent."""
        return self.parent / name

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, str]]:
        """Yield the file system and the path on it, for one operation."""
        system, base = open_filesystem(self.root)
        try:
            yield system, "/".join([base, *self.parts])
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(
                f"{self}: {_first_line(error)}; "
                "rerun the same command to resume when the storage can be used again"
            ) from None

    def _info(self) -> Any:
        with self._open() as (system, path):
            return system.get_file_info(path)

    def exists(self) -> bool:
        """Return True for a file and for a prefix of files."""
        from pyarrow.fs import FileType

        return self._info().type is not FileType.NotFound

    def stat(self) -> Stat:
        """Return size and modification time of a file; the time is 0 if the storage has none."""
        info = self._info()
        if not info.is_file:
            raise FileNotFoundError(str(self))
        modified_s = info.mtime.timestamp() if info.mtime else 0.0
        return Stat(info.size, modified_s, info.mtime_ns or 0)

    def read_bytes(self) -> bytes:
        """Return the content of the file."""
        with (
            self._open() as (system, path),
            system.open_input_file(path) as file,
        ):
            data: bytes = file.read()
        return data

    def read_text(self) -> str:
        """Return the content of the file, decoded as UTF-8."""
        return self.read_bytes().decode()

    def download(self, target: Path) -> None:
        """Copy the file to a local path."""
        with (
            self._open() as (system, path),
            system.open_input_stream(path, compression=None) as file,
            target.open("wb") as copy,
        ):
            while chunk := file.read(1 << 24):
                copy.write(chunk)

    def upload(self, source: Path) -> None:
        """Make this file a copy of a local one. Readers see the old content or the new."""
        atomic_upload = urlsplit(self.root).scheme in OBJECT_STORES
        with self._open() as (system, path):
            if atomic_upload:
                _write(system, path, source)
                return
            temporary = f"{path}.{uuid.uuid4().hex}.tmp"
            system.create_dir(path.rpartition("/")[0], recursive=True)
            _write(system, temporary, source)
            system.move(temporary, path)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file; raise FileNotFoundError if it is missing, unless `missing_ok`."""
        try:
            with self._open() as (system, path):
                system.delete_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Delete all files under the prefix, if there are any."""
        with (
            suppress(FileNotFoundError),
            self._open() as (system, path),
        ):
            system.delete_dir(path)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the paths below that match the pattern part by part.

        A pattern of one part yields files and prefixes, a longer one files only. It takes one
        request for each thousand files below.
        """
        patterns = pattern.split("/")
        depth = len(patterns)
        for path in self._list(recursive=depth > 1):
            names = path.parts[len(self.parts) :]
            if len(names) != depth:
                continue
            if all(map(fnmatchcase, names, patterns)):
                yield path

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield all files below whose name matches the pattern."""
        for path in self._list(recursive=True):
            if fnmatchcase(path.name, pattern):
                yield path

    def _list(self, recursive: bool) -> Iterator[RemotePath]:
        from pyarrow.fs import FileSelector

        with self._open() as (system, path):
            selector = FileSelector(path, recursive=recursive, allow_not_found=True)
            infos = system.get_file_info(selector)
        for info in infos:
            if info.is_file or not recursive:
                below = info.path[len(path) :].strip("/")
                yield self / below


def _write(
    system: Any,
    path: str,
    source: Path,
) -> None:
    import pyarrow as pa

    with system.open_output_stream(path, compression=None) as file:
        if source.stat().st_size:  # an empty file cannot be mapped into memory
            file.write(pa.memory_map(str(source)).read_buffer())


AnyPath = Path | RemotePath
"""The root of a store, local or remote."""


def poll_interval(store: AnyPath, local_s: float) -> float:
    """Return the pause between two polls of a store, in seconds: `local_s`, longer for remote."""
    if isinstance(store, Path):
        return local_s
    return max(local_s, POLL_S)
