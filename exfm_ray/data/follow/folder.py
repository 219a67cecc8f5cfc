"""A folder as the source of a followed stream: whole files, each taken once, in order of name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from exfm_ray.config.root import Config
from exfm_ray.data.labels.label_log import check_labels
from exfm_ray.data.prepare.duckdb_reader import read
from exfm_ray.data.sources.base import sql_literal
from exfm_ray.data.sources.schema_file import TableFile, checked
from exfm_ray.data.sources.table import described
from exfm_ray.errors import UserError

END = "_END"

Position = dict[str, Any]
"""How much was taken, as JSON. A follower stores it and resumes from it."""


@dataclass(frozen=True)
class Arrival:
    """Events or labels that came together.

    Attributes:
        rows: the events or labels.
        file: what they came in.
        position: the position behind them.
        held_ms: with several queues read side by side, no queue that is behind still holds an event
            older than this; None with one queue.
    """

    rows: pa.Table
    file: Path
    position: Position
    held_ms: int | None = None


class Arrivals(Protocol):
    """Where a followed stream comes from."""

    def events(self, after: Position) -> Arrival | None:
        """The next events behind a position, or None while there are none."""
        ...

    def labels(self, after: Position) -> Arrival | None:
        """The next labels behind a position, as rows of the label log, or None."""
        ...

    def ended(self) -> bool:
        """True when nothing more will come."""
        ...


@dataclass
class FolderArrivals:
    """Files below `data.root`.

    Their producer writes under another name and renames; names of new files sort behind older ones.
    """

    config: Config

    def __post_init__(self) -> None:
        self.spec = followed_spec(self.config)
        if not self.spec.files or self.spec.format == "json":
            raise UserError(
                f"{self.config.data.schema_file}: a folder is followed by its csv or parquet "
                "files; set `format` and `files`"
            )

    def events(self, after: Position) -> Arrival | None:
        following = self._next(self.spec.patterns, after)
        if following is None:
            return None
        path, position = following
        data = self.config.data
        source = described(self.spec, (path,), data.delayed)
        scratch = self.config.folder / "prepare.tmp"
        tables = list(read(source, data.memory_mb, scratch))
        rows = pa.table({})
        if tables:
            rows = pa.concat_tables(tables)
        return Arrival(rows, path, position)

    def labels(self, after: Position) -> Arrival | None:
        follow = self.config.data.follow
        if follow is None or not follow.labels:
            return None
        following = self._next((follow.labels,), after)
        if following is None:
            return None
        path, position = following
        tasks = self.config.data.delayed
        raw = _label_file(path)
        labels = check_labels(raw, tasks, str(path))
        return Arrival(labels, path, position)

    def _next(
        self,
        patterns: tuple[str, ...],
        after: Position,
    ) -> tuple[Path, Position] | None:
        """The first file behind a position, and the position behind that file."""
        root = self.config.data.root
        names = self._file_names(patterns)
        last = after.get("file", "")
        count = after.get("files", 0)
        taken = sum(name <= last for name in names)
        if taken > count:
            raise UserError(
                f"{root}: {taken} files up to '{last}', where {count} were taken: a file came "
                "whose name is not behind those before it; new files need names that grow"
            )
        if taken == len(names):
            return None
        name = names[taken]
        return root / name, {"file": name, "files": count + 1}

    def _file_names(self, patterns: tuple[str, ...]) -> list[str]:
        """Names of all files that match, sorted."""
        root = self.config.data.root
        names = set()
        for pattern in patterns:
            for path in root.glob(pattern):
                if not path.is_file():
                    continue
                relative = path.relative_to(root)
                names.add(relative.as_posix())
        return sorted(names)

    def ended(self) -> bool:
        marker = self.config.data.root / END
        return marker.exists()


def followed_spec(config: Config) -> TableFile:
    """The schema file of a followed stream.

    Raises:
        UserError: the schema file declares no event time or example id, or declares label times.
    """
    spec = checked(config)
    file = config.data.schema_file
    if spec.example_id is None or spec.event_time is None:
        raise UserError(
            f"{file}: a followed stream needs `event_time` and `example_id`; declare both"
        )
    if spec.label_time:
        raise UserError(
            f"{file}: `label_time` is of labels that stand with their events; these come apart"
        )
    return spec


def _label_file(path: Path) -> pa.Table:
    try:
        if path.suffix == ".csv":
            query = f"SELECT * FROM read_csv({sql_literal(path)}, header=true)"
            relation = duckdb.sql(query)
            return relation.to_arrow_table()
        return pq.read_table(path, partitioning=None)
    except (duckdb.Error, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable label file ({reason})") from None


def metadata_value(facts: Mapping[bytes, bytes] | None, key: str) -> str | None:
    """A value of a Parquet file's metadata, or None."""
    if not facts:
        return None
    value = facts.get(key.encode())
    if value is None:
        return None
    return value.decode()
