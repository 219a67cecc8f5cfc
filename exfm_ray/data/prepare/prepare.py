"""Raw data to an event stream: `prepare(config)`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

from exfm_ray.config.root import Config
from exfm_ray.data.follow.folder import FolderArrivals
from exfm_ray.data.follow.follower import Follower
from exfm_ray.data.follow.kafka import KafkaArrivals
from exfm_ray.data.labels.writer import LabeledWriter
from exfm_ray.data.prepare.checks import check_attribution, check_tasks, check_windows
from exfm_ray.data.prepare.duckdb_reader import part_rows, read
from exfm_ray.data.prepare.packer import Packer, Rows
from exfm_ray.data.prepare.rollback import remove_uncommitted, rollback_on_error
from exfm_ray.data.prepare.settings import is_stream_of, stream_settings
from exfm_ray.data.prepare.window_cutter import Progress, WindowCutter
from exfm_ray.data.sources import synthetic
from exfm_ray.data.sources.base import RawSource, with_table_rows
from exfm_ray.data.sources.registry import raw_source
from exfm_ray.data.sources.schema_file import load
from exfm_ray.data.stream import EventStream, StreamWriter
from exfm_ray.schema import Schema
from exfm_ray.storage.locks import file_lock
from exfm_ray.storage.remote import AnyPath

__all__ = ["follow", "prepare", "source_schema", "stream_folder"]

Check = Callable[[Schema], None]


def stream_folder(config: Config) -> AnyPath:
    """Folder of a run's stream."""
    stores = config.stores
    return stores / "stream"


def prepare(
    config: Config,
    progress: Progress | None = None,
    check: Check | None = None,
) -> EventStream:
    """Turn the raw data of `config.data` into the event stream `<stores>/stream`, window by window.

    A complete stream with the same settings is returned as it is, a followed one (`follow`) as far
    as it has come. After an interruption, committed windows stay untouched, the state that their
    events leave behind (history, normalizer, numbers) is computed again, and the files come out the
    same. Memory does not depend on the size of the input.

    Args:
        config: the run; `data`, `seed` and the run's folder are read.
        progress: called with (window, rows) when a window is done.
        check: called with the stream's schema before anything is written. It raises an error if the
            run does not fit the schema.

    Raises:
        UserError: the raw data or the settings are wrong; names the file, column and value, and the
            way out. The folder's earlier content is untouched and nothing new is left there.
    """
    root = stream_folder(config)
    if config.data.follow or _finished_elsewhere(root, config):
        return EventStream.open(root)
    schema, source = _resolve(config)
    check_windows(config, source)
    check_attribution(config, schema, source)
    if check:
        check(schema)

    with rollback_on_error(root):
        writer = _writer(config, root, schema, source)
        stream = EventStream(root, schema)
        if not stream.complete:
            remove_uncommitted(root)
            if source:
                statistics = _write_windows(config, writer, source, progress)
            else:
                statistics = synthetic.write(config, writer, progress)
            writer.finish(statistics)
    return stream


def follow(
    config: Config,
    progress: Progress | None = None,
    check: Check | None = None,
) -> EventStream:
    """Add everything that comes into `data.root` to the stream `<stores>/stream` until it ends (see
    `data.follow.follower`).

    Can be killed at any time; called again it resumes, with the same result. One process at a time
    follows a stream. The lock is in the run's folder, so it does not exclude the follower of a
    remote stream whose run has its folder elsewhere.

    Args:
        config: see `prepare`.
        progress: see `prepare`.
        check: see `prepare`.
    """
    root = stream_folder(config)
    is_kafka = config.data.source == "kafka"
    arrivals = KafkaArrivals(config) if is_kafka else FolderArrivals(config)
    schema = with_table_rows(arrivals.spec.table_schema, config.data.table_rows)
    source = RawSource(schema=schema, files=(config.data.root,), query="")
    check_tasks(config, schema)
    if check:
        check(schema)

    config.folder.mkdir(parents=True, exist_ok=True)
    lock = config.folder / ".follow.lock"
    with file_lock(lock, lambda holder: f"{root}: {holder} follows this stream already"):
        settings = stream_settings(config, schema, None)
        writer = StreamWriter(root, schema, settings, config.data.fragment_rows)
        remove_uncommitted(root)
        follower = Follower(config, writer, arrivals, source, progress)
        follower.run()
    return EventStream.open(root)


def source_schema(config: Config) -> Schema:
    """The schema that a stream of `config.data` will have.

    No data are read. A `table` or `kafka` source needs its schema file; other raw sources need
    their files' names and headers. Raises UserError if these are missing.
    """
    if config.data.source in ("table", "kafka"):
        spec = load(config.data.schema_file)
        return with_table_rows(spec.table_schema, config.data.table_rows)
    schema, _ = _resolve(config)
    return schema


def _resolve(config: Config) -> tuple[Schema, RawSource | None]:
    """The schema of the stream and its raw source, which is None for the synthetic stream."""
    table_rows = config.data.table_rows
    if config.data.source == "synthetic":
        schema = synthetic.schema(config.data.synthetic)
        schema = with_table_rows(schema, table_rows)
        return schema, None
    source = raw_source(config)
    schema = with_table_rows(source.schema, table_rows)
    resized = replace(source, schema=schema)
    return schema, resized


def _finished_elsewhere(root: AnyPath, config: Config) -> bool:
    """True when the stream is complete and its raw data are not on this machine. Then the settings
    alone decide whether it is the right stream."""
    data = config.data
    if data.source == "synthetic" or data.root.is_dir():
        return False
    manifest = root / "manifest.json"
    if not manifest.exists():
        return False
    return is_stream_of(root, config)


def _writer(
    config: Config,
    root: AnyPath,
    schema: Schema,
    source: RawSource | None,
) -> StreamWriter:
    data = config.data
    settings = stream_settings(config, schema, source)
    if not data.delayed:
        return StreamWriter(root, schema, settings, data.fragment_rows)
    return LabeledWriter(
        root,
        schema,
        settings,
        data.fragment_rows,
        data.delayed,
        data.late_labels,
    )


def _write_windows(
    config: Config,
    writer: StreamWriter,
    source: RawSource,
    progress: Progress | None,
) -> dict[str, Any]:
    """Read, encode, cut and write all events; returns statistics for the stream's manifest."""
    data = config.data
    file_rows: list[int] = []
    if data.window.by == "file":
        file_rows = part_rows(source, data.memory_mb)
    packer = Packer(source, drop_duplicates=data.duplicates == "drop")
    cutter = WindowCutter(writer, data.window, source.name, progress, file_rows)
    scratch = config.folder / "prepare.tmp"
    with closing(read(source, data.memory_mb, scratch)) as tables:
        for raw in tables:
            rows = packer.encode(raw)
            limit = None
            if data.max_rows is not None:
                limit = data.max_rows - cutter.rows
            _add_up_to(cutter, packer, rows, limit)
            if cutter.rows == data.max_rows:
                break
    cutter.finish()
    return cutter.statistics() | {"tables": packer.collisions.statistics()}


def _add_up_to(
    cutter: WindowCutter,
    packer: Packer,
    rows: Rows,
    limit: int | None,
) -> None:
    """Add events to the windows until `limit` of them are kept; all of them if None."""
    kept_N = packer.kept(rows)
    end = len(rows)
    if limit is not None and limit < kept_N.sum():
        number_N = kept_N.cumsum()
        end = int(number_N.searchsorted(limit)) + 1
    cutter.add(rows.take(slice(0, end)), kept_N[:end])
