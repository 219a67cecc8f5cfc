"""The event stream on disk: windows of Parquet fragments. A window is visible once its manifest is
written, which happens last.

<stream>/schema.json                       the schema
<stream>/window=000/fragment=0000.parquet  packed columns, in event order; one unit of work for the
                                           DAS and the feed
<stream>/window=000/manifest.json          written last of its window: fragments, rows, times
<stream>/manifest.json                     written last of all: the stream's settings and windows
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exfm_ray.base import FrozenModel
from exfm_ray.data.rebatch import Rebatcher
from exfm_ray.errors import UserError
from exfm_ray.schema import Schema, SparseFeature
from exfm_ray.storage.atomic import atomic_path, parquet_source, read_json, write_json
from exfm_ray.storage.manifest import read_manifest
from exfm_ray.storage.remote import AnyPath

ROW_GROUP_ROWS = 50_000


class Fragment(FrozenModel):
    """One Parquet file of a window."""

    file: str
    rows: int
    bytes: int
    domain_rows: tuple[int, ...]


class Window(FrozenModel):
    """A slice of the stream in time: [start_ms, end_ms)."""

    index: int
    start_ms: int
    end_ms: int
    rows: int
    duplicates: int
    schema_digest: str
    fragments: tuple[Fragment, ...]


def window_name(index: int) -> str:
    """Folder of window `index`, in the stream and in the supervision store alike."""
    return f"window={index:03d}"


def list_values(column: pa.ChunkedArray | pa.Array, width: int) -> np.ndarray[Any, Any]:
    """View a fixed-size-list column as a read-only array of shape (rows, width).

    A column of one chunk is not copied.
    """
    array = column
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)

    rows = len(array)
    flat = array.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat).reshape(rows, width)


def read_parquet(path: AnyPath, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file and verify its page checksums.

    `pyarrow.dataset` is avoided: it doubles the time for a fragment.
    """
    source = parquet_source(path)
    names = list(columns) if columns else None
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        table: pa.Table = file.read(columns=names, use_threads=False)
    return table


class EventStream:
    """Reads a prepared stream and checks each fragment against its manifest when it is read."""

    def __init__(self, root: AnyPath, schema: Schema) -> None:
        self.root = root
        self.schema = schema

    @classmethod
    def open(cls, root: AnyPath) -> Self:
        """Open a stream. Its schema must be written; it need not be complete."""
        path = root / "schema.json"
        if not path.exists():
            raise UserError(
                f"{root}: no prepared stream here; run `run.py prepare` with the same config first"
            )
        schema = read_manifest(path, Schema, "a schema")
        return cls(root, schema)

    @property
    def complete(self) -> bool:
        """True when the stream has an end and that end is written."""
        manifest = self.root / "manifest.json"
        return manifest.exists()

    def windows(self) -> list[int]:
        """Indices of the committed windows, in time order."""
        manifests = self.root.glob("window=*/manifest.json")
        names = [path.parent.name for path in manifests]
        return sorted(int(name.removeprefix("window=")) for name in names)

    def has(self, index: int) -> bool:
        """True when a window is committed."""
        manifest = self._manifest(index)
        return manifest.exists()

    def _manifest(self, index: int) -> AnyPath:
        folder = self.root / window_name(index)
        return folder / "manifest.json"

    def window(self, index: int) -> Window:
        """The manifest of a committed window."""
        path = self._manifest(index)
        if not path.exists():
            count = len(self.windows())
            raise UserError(
                f"{path}: window {index} is not prepared; the stream has {count} windows"
            )
        window = read_manifest(path, Window, "a window manifest", "prepare the stream again")
        if window.schema_digest != self.schema.digest:
            raise UserError(
                f"{path}: this window was prepared with another schema; "
                "prepare the stream into a new folder"
            )
        return window

    def path(self, window: int, fragment: Fragment) -> AnyPath:
        """Path of a fragment. Raises UserError for a name that leaves the window's folder."""
        name = fragment.file
        plain_name = Path(name).name
        if plain_name != name:
            manifest = self._manifest(window)
            raise UserError(f"{manifest}: fragment '{name}' is not a plain file name")
        folder = self.root / window_name(window)
        return folder / name

    def read(
        self,
        window: int,
        fragment: Fragment,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """Read packed columns of a fragment and check them against its manifest and the schema.

        Args:
            window: index of the window.
            fragment: one of the window's fragments.
            columns: names of the columns to read; None reads all of them.

        Raises:
            UserError: the file is missing, damaged, or does not match the manifest or the schema.
        """
        path = self.path(window, fragment)
        try:
            size = path.stat().st_size
            if size != fragment.bytes:
                raise UserError(
                    f"{path}: {size} bytes where the manifest says {fragment.bytes}; "
                    "prepare the stream again"
                )
            table = read_parquet(path, columns)
        except FileNotFoundError:
            raise UserError(
                f"{path}: the manifest names this fragment, but it is not there; "
                "prepare the stream again"
            ) from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: not a readable Parquet file ({error}); prepare the stream again"
            ) from None
        self._check(path, table, fragment)
        return table

    def _check(
        self,
        path: AnyPath,
        table: pa.Table,
        fragment: Fragment,
    ) -> None:
        if table.num_rows != fragment.rows:
            raise UserError(
                f"{path}: {table.num_rows} rows where the manifest says {fragment.rows}"
            )
        self._check_types(path, table)
        self._check_single_ids(path, table)
        self._check_bag_ids(path, table)

    def _check_types(self, path: AnyPath, table: pa.Table) -> None:
        for expected in self.schema.arrow_schema:
            name = expected.name
            if name not in table.column_names:
                continue
            actual = table.schema.field(name).type
            if actual != expected.type:
                raise UserError(
                    f"{path}: column '{name}' is {actual}, the schema says {expected.type}"
                )

    def _check_single_ids(self, path: AnyPath, table: pa.Table) -> None:
        if "sparse" not in table.column_names or not table.num_rows:
            return
        features = self.schema.single
        ids_NS = list_values(table["sparse"], len(features))
        low_S = ids_NS.min(axis=0)
        high_S = ids_NS.max(axis=0)
        for feature, low, high in zip(features, low_S, high_S, strict=True):
            _check_range(path, feature, int(low), int(high))

    def _check_bag_ids(self, path: AnyPath, table: pa.Table) -> None:
        for bag in self.schema.bags:
            if bag.name not in table.column_names:
                continue
            lists = table[bag.name].combine_chunks()
            flat = lists.flatten()
            values = flat.to_numpy(zero_copy_only=False)
            if len(values):
                low = int(values.min())
                high = int(values.max())
                _check_range(path, bag, low, high)


def _check_range(
    path: AnyPath,
    feature: SparseFeature,
    low: int,
    high: int,
) -> None:
    """Raise UserError when the lowest or the highest id is outside the feature's table."""
    if low >= 0 and high < feature.rows:
        return
    outside = low if low < 0 else high
    raise UserError(
        f"{path}: feature '{feature.name}' has id {outside}, outside its table of "
        f"{feature.rows} rows; raise `rows` in the schema and prepare the stream again"
    )


class StreamWriter:
    """Writes a stream window by window. Windows that are already committed stay untouched."""

    def __init__(
        self,
        root: AnyPath,
        schema: Schema,
        settings: dict[str, Any],
        fragment_rows: int,
    ) -> None:
        """Start or continue a stream in `root`.

        Args:
            root: folder of the stream.
            schema: what the examples are.
            settings: how the stream is made, as JSON. A folder that holds a stream with other
                settings is refused and stays untouched.
            fragment_rows: rows in a fragment.
        """
        self.root = root
        self.schema = schema
        self.settings = settings
        self.fragment_rows = fragment_rows

        stored = root / "settings.json"
        if stored.exists() and read_json(stored) != settings:
            raise UserError(
                f"{root}: holds a stream made with another schema or other settings "
                f"(see {stored}); remove it or choose another run name"
            )
        write_json(stored, settings)
        write_json(root / "schema.json", schema.model_dump(mode="json"))

    @cached_property
    def committed(self) -> frozenset[int]:
        """Windows that an earlier, interrupted preparation has finished."""
        stream = EventStream(self.root, self.schema)
        return frozenset(stream.windows())

    def window(
        self,
        index: int,
        start_ms: int,
        end_ms: int,
    ) -> WindowWriter:
        """Begin a window. It becomes visible with `WindowWriter.commit`."""
        return WindowWriter(self, index, start_ms, end_ms)

    def write_window(
        self,
        index: int,
        start_ms: int,
        end_ms: int,
        duplicates: int,
        tables: Iterable[pa.Table],
    ) -> None:
        """Write one whole window from packed tables in event order."""
        window = self.window(index, start_ms, end_ms)
        if window.committed:
            return
        for table in tables:
            window.append(table)
        window.commit(duplicates)

    def write_fragment(
        self,
        folder: AnyPath,
        number: int,
        table: pa.Table,
    ) -> Fragment:
        """Write one fragment. `WindowWriter` lists it in the window's manifest."""
        path = folder / f"fragment={number:04d}.parquet"
        arrow_schema = self.schema.arrow_schema
        with atomic_path(path) as temporary:
            packed = table.select(arrow_schema.names).cast(arrow_schema)
            pq.write_table(
                packed,
                temporary,
                row_group_size=ROW_GROUP_ROWS,
                compression="zstd",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            )
        domain_N = table["domain"].to_numpy()
        return Fragment(
            file=path.name,
            rows=table.num_rows,
            bytes=path.stat().st_size,
            domain_rows=domain_counts(domain_N, self.schema),
        )

    def finish(self, statistics: dict[str, Any]) -> None:
        """Write the stream's manifest: the stream is now complete."""
        stream = EventStream(self.root, self.schema)
        manifest = {
            "windows": stream.windows(),
            "settings": self.settings,
            **statistics,
        }
        write_json(self.root / "manifest.json", manifest)


def domain_counts(domain_N: np.ndarray[Any, Any], schema: Schema) -> tuple[int, ...]:
    """Count the rows of each domain, in the order of `schema.domains`."""
    counts_D = np.bincount(domain_N, minlength=len(schema.domains))
    return tuple(int(count) for count in counts_D)


class WindowWriter:
    """Writes one window: tables come in, fragments of `fragment_rows` go out, the manifest last."""

    def __init__(
        self,
        writer: StreamWriter,
        index: int,
        start_ms: int,
        end_ms: int,
    ) -> None:
        self.index = index
        self.start_ms = start_ms
        self.end_ms = end_ms
        self.committed = index in writer.committed
        self._writer = writer
        self._folder = writer.root / window_name(index)
        self._rebatcher = Rebatcher(writer.fragment_rows)
        self._fragments: list[Fragment] = []

    def append(self, table: pa.Table, known_NT: np.ndarray[Any, Any] | None = None) -> None:
        """Add packed rows in event order. Does nothing in a window that is already committed.

        Args:
            table: packed rows.
            known_NT: int64 (N, T), ms at which each label became known. Used only by writers of
                streams with late labels.
        """
        if self.committed:
            return
        for piece in self._rebatcher.add(table):
            self._write(piece)

    def _write(self, table: pa.Table) -> None:
        number = len(self._fragments)
        fragment = self._writer.write_fragment(self._folder, number, table)
        self._fragments.append(fragment)

    def commit(self, duplicates: int) -> None:
        """Write the remaining rows and the manifest: the window is now visible."""
        if self.committed:
            return
        for piece in self._rebatcher.flush():
            self._write(piece)
        window = Window(
            index=self.index,
            start_ms=self.start_ms,
            end_ms=self.end_ms,
            rows=sum(fragment.rows for fragment in self._fragments),
            duplicates=duplicates,
            schema_digest=self._writer.schema.digest,
            fragments=tuple(self._fragments),
        )
        write_json(self._folder / "manifest.json", window.model_dump(mode="json"))
        self.committed = True
