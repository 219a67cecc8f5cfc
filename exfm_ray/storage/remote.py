"""Files on a remote file system, named by a URL: as much of pathlib as the stores of a run need,
over pyarrow's file systems.

S3 and Google Cloud Storage are built into pyarrow; any other scheme is fsspec's. A file is put
whole: an object of S3 or GCS appears when its upload is complete; elsewhere a file is written under
another name and moved. Credentials come from the environment alone.
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
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from exfm_ray.errors import UserError

OBJECT_STORES = {
    "s3": "S3 (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)",
    "gs": "Google Cloud (GOOGLE_APPLICATION_CREDENTIALS)",
}
"""Schemes whose files are objects, put in one step; and where their credentials come from."""
OPTIONS = {"s3": {"region", "endpoint_override", "scheme"}, "gs": {"endpoint_override", "scheme"}}
"""What may follow the `?` of their URLs."""
PROBE_ATTEMPTS = 3
TRIES = 8
"""Tries of a request, with pauses that double from half a second: at the first look, where a
mistake is likely; then some 40 s in all."""
CONNECT_S = 10.0
GCS_S = 60.0
POLL_S = 1.0
"""Shortest pause between two looks at a remote place for what may have come."""


class StorageError(UserError):
    """A remote file system could not be used: nothing is known of the file."""


def check_url(url: str) -> str:
    """The URL; ValueError where it is none, holds credentials, or no file system that is installed
    reads it."""
    parts = urlsplit(url)
    if "://" not in url or not parts.scheme:
        raise ValueError(
            "is no URL; write it as s3://bucket/prefix, or remove it: without it all lies below run.dir"
        )
    if parts.password or (parts.username and parts.scheme in OBJECT_STORES):
        raise ValueError(
            "holds credentials, which would be written into the run's folder; put them into the environment of all nodes"
            + (f", for {OBJECT_STORES[parts.scheme]}" if parts.scheme in OBJECT_STORES else "")
        )
    options = parse_qs(parts.query)
    allowed = OPTIONS.get(parts.scheme, set())
    if unknown := sorted(options.keys() - allowed):
        raise ValueError(
            f"has the option '{unknown[0]}'; known for '{parts.scheme}': {', '.join(sorted(allowed)) or 'none'}"
        )
    if any("@" in value for values in options.values() for value in values):
        raise ValueError(
            "holds credentials in an option; put them into the environment of all nodes"
        )
    if parts.scheme in OBJECT_STORES and not parts.netloc:
        raise ValueError(f"names no bucket; write it as {parts.scheme}://bucket/prefix")
    if parts.scheme not in OBJECT_STORES:
        import fsspec

        try:
            fsspec.get_filesystem_class(parts.scheme)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"no file system for '{parts.scheme}' is installed ({error}); s3 and gs are built in"
            ) from None
    return url


def redact_url(url: str) -> str:
    """A URL as it may be shown: without user, password and options."""
    head, separator, rest = url.partition("://")
    return f"{head}://{rest.partition('?')[0].rpartition('@')[2]}" if separator else url


@lru_cache(maxsize=8)
def open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of a checked URL, and the URL's path on it. It is looked at once: UserError
    where it cannot be used."""
    from pyarrow import fs

    parts = urlsplit(url)
    shown = redact_url(url)
    base = f"{parts.netloc}{parts.path}".rstrip("/")
    try:
        if parts.scheme == "s3":
            door, system = (_s3(parts, tries) for tries in (PROBE_ATTEMPTS, TRIES))
        elif parts.scheme == "gs":
            door = system = fs.GcsFileSystem(
                retry_time_limit=timedelta(seconds=GCS_S), **_options(parts)
            )
        else:
            import fsspec

            other, base = fsspec.url_to_fs(url, use_listings_cache=False)
            door = system = fs.PyFileSystem(fs.FSSpecHandler(other))
        found = door.get_file_info(parts.netloc if parts.scheme in OBJECT_STORES else base)
    except OSError as error:
        place = OBJECT_STORES.get(parts.scheme, parts.scheme)
        raise StorageError(
            f"setting 'run.storage': {shown} cannot be reached ({_plain(error)}); does the environment of this process hold credentials for "
            f"{place}, may they list the bucket, and is the address right?"
        ) from None
    if parts.scheme in OBJECT_STORES and found.type is fs.FileType.NotFound:
        raise UserError(
            f"setting 'run.storage': {shown}: there is no bucket '{parts.netloc}'; create it, or correct the name"
        )
    return system, base


def _options(parts: SplitResult) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(parts.query).items()}


def _s3(parts: SplitResult, tries: int) -> Any:
    """The endpoint and region of the URL, else the environment's, else Amazon's and the bucket's
    own."""
    from pyarrow import fs

    options = _options(parts)
    environment = os.environ
    named = environment.get("AWS_ENDPOINT_URL_S3") or environment.get(
        "AWS_ENDPOINT_URL"
    )  # pyarrow itself does not look at them
    if named and "endpoint_override" not in options:
        scheme, _, address = named.rstrip("/").rpartition("://")
        options |= {
            "endpoint_override": address,
            "scheme": options.get("scheme", scheme or "https"),
        }
    if "region" not in options:
        region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
        options["region"] = region or (
            "us-east-1" if "endpoint_override" in options else fs.resolve_s3_region(parts.netloc)
        )
    return fs.S3FileSystem(
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=tries),
        connect_timeout=CONNECT_S,
        allow_delayed_open=True,
        **options,
    )


def _plain(error: OSError) -> str:
    return str(error).splitlines()[0]


@dataclass(frozen=True)
class Stat:
    """What is asked of a file."""

    st_size: int
    st_mtime: float
    st_mtime_ns: int


@dataclass(frozen=True)
class RemotePath:
    """A file, or what lies under a prefix: `root` is a URL that `check_url` has passed, `parts` the
    names below it.

    As with pathlib, a missing file is a FileNotFoundError. Whatever else goes wrong is a
    StorageError.
    """

    root: str
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "/".join([redact_url(self.root).rstrip("/"), *self.parts])

    def __truediv__(self, below: str) -> RemotePath:
        parts = below.split("/")
        if ".." in parts:
            raise UserError(f"{self}: '{below}' does not lie below it")
        return RemotePath(self.root, (*self.parts, *parts))

    @property
    def name(self) -> str:
        """The last part."""
        return self.parts[-1] if self.parts else ""

    @property
    def parent(self) -> RemotePath:
        """Without the last part."""
        return RemotePath(self.root, self.parts[:-1])

    def with_name(self, name: str) -> RemotePath:
        """Beside it."""
        return self.parent / name

    @contextmanager
    def _at(self) -> Iterator[tuple[Any, str]]:
        """The file system and the path on it, for one operation."""
        system, base = open_filesystem(self.root)
        try:
            yield system, "/".join([base, *self.parts])
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(
                f"{self}: {_plain(error)}; the same command goes on when the storage can be used again"
            ) from None

    def _info(self) -> Any:
        with self._at() as (system, path):
            return system.get_file_info(path)

    def exists(self) -> bool:
        """True for a file, and for a prefix of files."""
        from pyarrow.fs import FileType

        return self._info().type is not FileType.NotFound

    def stat(self) -> Stat:
        """Of a file."""
        info = self._info()
        if not info.is_file:
            raise FileNotFoundError(str(self))
        return Stat(info.size, info.mtime.timestamp() if info.mtime else 0.0, info.mtime_ns or 0)

    def read_bytes(self) -> bytes:
        """The whole file."""
        with self._at() as (system, path), system.open_input_file(path) as file:
            data: bytes = file.read()
        return data

    def read_text(self) -> str:
        """The whole file, UTF-8."""
        return self.read_bytes().decode()

    def download(self, target: Path) -> None:
        """Copy the file to this machine."""
        with (
            self._at() as (system, path),
            system.open_input_stream(path, compression=None) as file,
            target.open("wb") as copy,
        ):
            while piece := file.read(1 << 24):
                copy.write(piece)

    def upload(self, source: Path) -> None:
        """Make this file a copy of a local one, in one step for all who read it."""
        import pyarrow as pa

        objects = urlsplit(self.root).scheme in OBJECT_STORES
        with self._at() as (system, path):
            target = path if objects else f"{path}.{uuid.uuid4().hex}.tmp"
            if not objects:
                system.create_dir(path.rpartition("/")[0], recursive=True)
            with system.open_output_stream(target, compression=None) as file:
                if source.stat().st_size:  # nothing cannot be mapped into memory
                    file.write(pa.memory_map(str(source)).read_buffer())
            if not objects:
                system.move(target, path)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete a file."""
        try:
            with self._at() as (system, path):
                system.delete_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Delete all files under a prefix, if any."""
        with suppress(FileNotFoundError), self._at() as (system, path):
            system.delete_dir(path)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What lies below, as deep as the pattern and matching it part by part: for a pattern of
        one part files and prefixes, for a longer one files. A request for each thousand files
        below."""
        wanted = pattern.split("/")
        for path in self._relative(recursive=len(wanted) > 1):
            names = path.parts[len(self.parts) :]
            if len(names) == len(wanted) and all(map(fnmatchcase, names, wanted)):
                yield path

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """All files below whose name matches."""
        return (path for path in self._relative(recursive=True) if fnmatchcase(path.name, pattern))

    def _relative(self, recursive: bool) -> Iterator[RemotePath]:
        from pyarrow.fs import FileSelector

        with self._at() as (system, path):
            found = system.get_file_info(
                FileSelector(path, recursive=recursive, allow_not_found=True)
            )
        for info in found:
            if info.is_file or not recursive:
                yield self / info.path[len(path) :].strip("/")


AnyPath = Path | RemotePath
"""Where a store lies."""


def poll_interval(place: AnyPath, local_s: float) -> float:
    """Pause between two looks at a place: `local_s`, where a look is a request longer."""
    return local_s if isinstance(place, Path) else max(local_s, POLL_S)
