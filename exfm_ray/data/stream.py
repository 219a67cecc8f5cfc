"""The event stream on disk: windows of Parquet fragments, visible by a manifest that is written
last.

<stream>/schema.json                       the schema
<stream>/window=000/fragment=0000.parquet  packed columns, in event order; the unit of work of the
DAS and the feed
<stream>/window=000/manifest.json          last of its window: fragments, rows, times, state of the normaliser
<stream>/manifest.json                     last of all: the settings the stream was made with, and its windows
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
from exfm_ray.schema import Schema
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
    """A fixed-size-list column as a read-only array (rows, width); no copy when the column is one
    chunk."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    flat = array.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat).reshape(len(array), width)


def read_parquet(path: AnyPath, columns: Sequence[str] | None = None) -> pa.Table:
    """One Parquet file, its page checksums verified. Without `pyarrow.dataset`, which takes as long
    again for a fragment."""
    with pq.ParquetFile(parquet_source(path), page_checksum_verification=True) as file:
        table: pa.Table = file.read(columns=list(columns) if columns else None, use_threads=False)
    return table


class EventStream:
    """Reads a prepared stream; checks at the door that each fragment is what its manifest says."""

    def __init__(self, root: AnyPath, schema: Schema) -> None:
        self.root = root
        self.schema = schema

    @classmethod
    def open(cls, root: AnyPath) -> Self:
        """Open a stream of which at least the schema is written."""
        if not (root / "schema.json").exists():
            raise UserError(
                f"{root}: no prepared stream here; run `run.py prepare` with the same config first"
            )
        return cls(root, read_manifest(root / "schema.json", Schema, "a schema"))

    @property
    def complete(self) -> bool:
        """True when the stream has an end and it is written."""
        return (self.root / "manifest.json").exists()

    def windows(self) -> list[int]:
        """Indices of the committed windows, in time order."""
        found = self.root.glob("window=*/manifest.json")
        return sorted(int(path.parent.name.removeprefix("window=")) for path in found)

    def has(self, index: int) -> bool:
        """True when a window is committed."""
        return (self.root / window_name(index) / "manifest.json").exists()

    def window(self, index: int) -> Window:
        """The manifest of a committed window."""
        path = self.root / window_name(index) / "manifest.json"
        if not path.exists():
            raise UserError(
                f"{path}: window {index} is not prepared; the stream has {len(self.windows())} windows"
            )
        window = read_manifest(path, Window, "a window manifest", "prepare the stream again")
        if window.schema_digest != self.schema.digest:
            raise UserError(
                f"{path}: this window was prepared with another schema; prepare the stream into a new folder"
            )
        return window

    def path(self, window: int, fragment: Fragment) -> AnyPath:
        """Where a fragment lies; a name that leaves its folder is refused."""
        folder = self.root / window_name(window)
        if Path(fragment.file).name != fragment.file:
            raise UserError(
                f"{folder / 'manifest.json'}: fragment '{fragment.file}' is not a plain file name"
            )
        return folder / fragment.file

    def read(
        self,
        window: int,
        fragment: Fragment,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """Read a fragment's packed columns (all of them, or `columns`), checked against manifest
        and schema."""
        path = self.path(window, fragment)
        try:
            if path.stat().st_size != fragment.bytes:
                raise UserError(
                    f"{path}: {path.stat().st_size} bytes where the manifest says {fragment.bytes}; prepare the stream again"
                )
            table = read_parquet(path, columns)
        except FileNotFoundError:
            raise UserError(
                f"{path}: the manifest names this fragment, but it is not there; prepare the stream again"
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
        for field in self.schema.arrow_schema:
            if (
                field.name in table.column_names
                and table.schema.field(field.name).type != field.type
            ):
                raise UserError(
                    f"{path}: column '{field.name}' is {table.schema.field(field.name).type}, the schema says {field.type}"
                )
        if "sparse" in table.column_names and table.num_rows:
            ids_NS = list_values(table["sparse"], len(self.schema.single))
            low_S = ids_NS.min(axis=0)
            high_S = ids_NS.max(axis=0)
            for feature, low, high in zip(self.schema.single, low_S, high_S, strict=True):
                self._check_range(path, feature.name, feature.rows, int(low), int(high))
        for bag in self.schema.bags:
            if bag.name in table.column_names:
                values = table[bag.name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                if len(values):
                    self._check_range(
                        path, bag.name, bag.rows, int(values.min()), int(values.max())
                    )

    @staticmethod
    def _check_range(
        path: AnyPath,
        feature: str,
        rows: int,
        low: int,
        high: int,
    ) -> None:
        if low < 0 or high >= rows:
            raise UserError(
                f"{path}: feature '{feature}' has id {low if low < 0 else high}, outside its table of {rows} rows; "
                "raise `rows` in the schema and prepare the stream again"
            )


class StreamWriter:
    """Writes a stream window by window. A window that is committed already is left as it is."""

    def __init__(
        self,
        root: AnyPath,
        schema: Schema,
        settings: dict[str, Any],
        fragment_rows: int,
    ) -> None:
        """`settings` say how the stream was made; a folder that holds a stream made otherwise is
        refused, untouched."""
        self.root = root
        self.schema = schema
        self.settings = settings
        self.fragment_rows = fragment_rows
        made = root / "settings.json"
        if made.exists() and read_json(made) != settings:
            raise UserError(
                f"{root}: holds a stream made with another schema or other settings (see {made}); remove it or choose another run name"
            )
        write_json(made, settings)
        write_json(root / "schema.json", schema.model_dump(mode="json"))

    @cached_property
    def committed(self) -> frozenset[int]:
        """Windows that an earlier, interrupted preparation has finished."""
        return frozenset(EventStream(self.root, self.schema).windows())

    def window(
        self,
        index: int,
        start_ms: int,
        end_ms: int,
    ) -> WindowWriter:
        """Begin a window; nothing of it is visible before `WindowWriter.commit`."""
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
        """Write one fragment; `WindowWriter` names it in the manifest."""
        path = folder / f"fragment={number:04d}.parquet"
        with atomic_path(path) as temporary:
            packed = table.select(self.schema.arrow_schema.names).cast(self.schema.arrow_schema)
            pq.write_table(
                packed,
                temporary,
                row_group_size=ROW_GROUP_ROWS,
                compression="zstd",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            )
        counts = np.bincount(table["domain"].to_numpy(), minlength=len(self.schema.domains))
        return Fragment(
            file=path.name,
            rows=table.num_rows,
            bytes=path.stat().st_size,
            domain_rows=tuple(int(c) for c in counts),
        )

    def finish(self, statistics: dict[str, Any]) -> None:
        """Write the stream's manifest: from now on it is complete."""
        windows = EventStream(self.root, self.schema).windows()
        write_json(
            self.root / "manifest.json",
            {"windows": windows, "settings": self.settings, **statistics},
        )


class WindowWriter:
    """One window being written: tables come in, fragments of `fragment_rows` go out, the manifest
    last."""

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
        self._pieces = Rebatcher(writer.fragment_rows)
        self._fragments: list[Fragment] = []

    def append(self, table: pa.Table, known_NT: np.ndarray[Any, Any] | None = None) -> None:
        """Add packed rows in event order. Ignored in a window that an earlier preparation has
        committed.

        `known_NT`: ms at which each label became known; nobody asks where labels stand with their
            events.
        """
        if self.committed:
            return
        for piece in self._pieces.add(table):
            self._cut(piece)

    def _cut(self, table: pa.Table) -> None:
        self._fragments.append(
            self._writer.write_fragment(self._folder, len(self._fragments), table)
        )

    def commit(self, duplicates: int) -> None:
        """Write what waits and the manifest: from now on the window is visible."""
        if self.committed:
            return
        for piece in self._pieces.flush():
            self._cut(piece)
        window = Window(
            index=self.index,
            start_ms=self.start_ms,
            end_ms=self.end_ms,
            rows=sum(f.rows for f in self._fragments),
            duplicates=duplicates,
            schema_digest=self._writer.schema.digest,
            fragments=tuple(self._fragments),
        )
        write_json(self._folder / "manifest.json", window.model_dump(mode="json"))
        self.committed = True
