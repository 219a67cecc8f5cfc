"""What comes into a folder: whole files, taken once, in the order of their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from exfm_ray.config.root import Config
from exfm_ray.data.labels.label_log import check_labels
from exfm_ray.data.prepare.duckdb_reader import read
from exfm_ray.data.sources import table
from exfm_ray.data.sources.base import sql_literal
from exfm_ray.errors import UserError

END = "_END"

Position = dict[str, Any]
"""How much was taken, as JSON: what a follower stores, and by which it goes on."""


@dataclass(frozen=True)
class Arrival:
    """Events or labels that came together, what they came in, and the position behind them.

    `held_ms`: where several queues are read side by side, no older event is left in one that is
    behind; None where there is one queue.
    """

    rows: pa.Table
    file: Path
    position: Position
    held_ms: int | None = None


class Arrivals(Protocol):
    """Where a followed stream comes from."""

    def events(self, after: Position) -> Arrival | None:
        """The next events behind a position; None while there are none."""
        ...

    def labels(self, after: Position) -> Arrival | None:
        """The next labels, as rows of the label log."""
        ...

    def ended(self) -> bool:
        """True when nothing more will come than has come."""
        ...


@dataclass
class FolderArrivals:
    """Files below `data.root`. Their producer writes under another name and renames, with names
    that grow."""

    config: Config

    def __post_init__(self) -> None:
        self.spec = followed_spec(self.config)
        if not self.spec.files or self.spec.format == "json":
            raise UserError(
                f"{self.config.data.schema_file}: a folder is followed by its csv or parquet files; set `format` and `files`"
            )

    def events(self, after: Position) -> Arrival | None:
        for path, position in self._next(table.patterns(self.spec), after):
            source = table.described(self.spec, (path,), self.config.data.delayed)
            tables = list(
                read(source, self.config.data.memory_mb, self.config.folder / "prepare.tmp")
            )
            return Arrival(pa.concat_tables(tables) if tables else pa.table({}), path, position)
        return None

    def labels(self, after: Position) -> Arrival | None:
        pattern = self.config.data.follow.labels if self.config.data.follow else None
        for path, position in self._next((pattern,) if pattern else (), after):
            return Arrival(
                check_labels(_label_file(path), self.config.data.delayed, str(path)), path, position
            )
        return None

    def _next(self, patterns: tuple[str, ...], after: Position) -> Iterator[tuple[Path, Position]]:
        """The first file behind a position, if there is one."""
        root = self.config.data.root
        names = sorted(
            {
                path.relative_to(root).as_posix()
                for pattern in patterns
                for path in root.glob(pattern)
                if path.is_file()
            }
        )
        taken = [name for name in names if name <= after.get("file", "")]
        if len(taken) > after.get("files", 0):
            raise UserError(
                f"{root}: {len(taken)} files up to '{after['file']}', where {after['files']} were taken: a file came whose name is not behind those "
                "before it; new files need names that grow"
            )
        for name in names[len(taken) : len(taken) + 1]:
            yield root / name, {"file": name, "files": after.get("files", 0) + 1}

    def ended(self) -> bool:
        return (self.config.data.root / END).exists()


def followed_spec(config: Config) -> table.TableFile:
    """The schema file of a followed stream; UserError where it does not tell events apart."""
    spec = table.checked(config)
    if spec.example_id is None or spec.event_time is None:
        raise UserError(
            f"{config.data.schema_file}: a followed stream needs `event_time` and `example_id`; declare both"
        )
    if spec.label_time:
        raise UserError(
            f"{config.data.schema_file}: `label_time` is of labels that stand with their events; these come apart"
        )
    return spec


def _label_file(path: Path) -> pa.Table:
    try:
        if path.suffix == ".csv":
            return duckdb.sql(
                f"SELECT * FROM read_csv({sql_literal(path)}, header=true)"
            ).to_arrow_table()
        return pq.read_table(path, partitioning=None)
    except (duckdb.Error, pa.ArrowException) as error:
        raise UserError(
            f"{path}: not a readable label file ({str(error).splitlines()[0]})"
        ) from None


def metadata_value(facts: Mapping[bytes, bytes] | None, key: str) -> str | None:
    """A fact of a Parquet file's metadata."""
    found = (facts or {}).get(key.encode())
    return found.decode() if found is not None else None
