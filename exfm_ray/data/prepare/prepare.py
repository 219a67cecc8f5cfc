"""Raw data to an event stream: `prepare(config)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from exfm_ray.config.root import Config
from exfm_ray.data.follow.folder import FolderArrivals
from exfm_ray.data.follow.follower import Follower
from exfm_ray.data.follow.kafka import KafkaArrivals
from exfm_ray.data.labels.writer import LabeledWriter
from exfm_ray.data.prepare.duckdb_reader import part_rows, read
from exfm_ray.data.prepare.packer import Packer
from exfm_ray.data.prepare.window_cutter import Progress, WindowCutter
from exfm_ray.data.sources import avazu, criteo, frappe, kuairand, movielens, synthetic, table
from exfm_ray.data.sources.base import RawSource, with_table_rows
from exfm_ray.data.stream import EventStream, StreamWriter
from exfm_ray.errors import UserError, nearest
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import read_json, remove_tree
from exfm_ray.storage.locks import file_lock
from exfm_ray.storage.remote import AnyPath, StorageError

__all__ = ["follow", "prepare", "source_schema", "stream_folder"]

FORMAT = 1  # raise it when the same raw data would become other rows
SOURCES: dict[str, Callable[[Config], RawSource]] = {
    "kuairand": kuairand.source,
    "movielens": movielens.source,
    "frappe": frappe.source,
    "criteo": criteo.source,
    "avazu": avazu.source,
    "table": table.source,
}
# What does not change the content, or is told by the schema and the fingerprint of the files.
NOT_CONTENT = {"memory_mb", "root", "schema_file"}
LATE = {"attribution_s", "late_labels"}  # content of streams only in which labels come late


def stream_folder(config: Config) -> AnyPath:
    """Where a run's stream lies."""
    return config.stores / "stream"


def prepare(
    config: Config,
    progress: Progress | None = None,
    check: Callable[[Schema], None] | None = None,
) -> EventStream:
    """Turn the raw data of `config.data` into the event stream `<stores>/stream`, window by window.

    A complete stream with the same settings is returned as it is, a followed one (`follow`) as it
    is by now. After an interruption the windows committed before are left alone, what their events
    leave behind (history, normaliser, numbers) is computed again, and the files come out the same.
    Memory does not depend on the size of the input.

    Args:
        config: the run; `data`, `seed` and the run's folder are read.
        progress: called with (window, rows) when a window is done.
        check: called with the stream's schema before anything is written; raises where the run does
            not fit it.

    Raises:
        UserError: the raw data or the settings are at fault; names the file, column and value, and
            the way out. What was in the folder before is untouched and nothing new is left there.
    """
    root = stream_folder(config)
    if config.data.follow or _finished_elsewhere(root, config):
        return EventStream.open(root)
    source = None if config.data.source == "synthetic" else SOURCES[config.data.source](config)
    schema = with_table_rows(
        source.schema if source else synthetic.schema(config.data.synthetic), config.data.table_rows
    )
    source = replace(source, schema=schema) if source else None
    _check_windows(config, source)
    _check_attribution(config, schema, source)
    if check:
        check(schema)
    with rollback_on_error(root):
        writer = _writer(config, root, schema, _settings(config, schema, source))
        stream = EventStream(root, schema)
        if not stream.complete:
            remove_uncommitted(root)
            statistics = (
                _stream(config, writer, source, progress)
                if source
                else synthetic.write(config, writer, progress)
            )
            writer.finish(statistics)
    return stream


def follow(
    config: Config,
    progress: Progress | None = None,
    check: Callable[[Schema], None] | None = None,
) -> EventStream:
    """Take what comes into `data.root` into the stream `<stores>/stream` until it ends (see
    `data.prepare.follower`); arguments as for `prepare`.

    Can be killed at any time; called again it goes on, with the same result. One process at a time
    follows a stream: the lock is in the run's folder, so that it does not see the follower of a
    remote stream whose run has its folder elsewhere.
    """
    root = stream_folder(config)
    arrivals = KafkaArrivals(config) if config.data.source == "kafka" else FolderArrivals(config)
    schema = with_table_rows(arrivals.spec.table_schema, config.data.table_rows)
    source = RawSource(schema=schema, files=(config.data.root,), query="")
    _check_tasks(config, schema)
    if check:
        check(schema)
    config.folder.mkdir(parents=True, exist_ok=True)
    lock = config.folder / ".follow.lock"
    with file_lock(lock, lambda holder: f"{root}: {holder} follows this stream already"):
        writer = StreamWriter(
            root, schema, _settings(config, schema, None), config.data.fragment_rows
        )
        remove_uncommitted(root)
        Follower(config, writer, arrivals, source, progress).run()
    return EventStream.open(root)


def source_schema(config: Config) -> Schema:
    """The schema that a stream of `config.data` will have. No data are read: a `table` source needs
    its schema file alone, the other raw sources their files' names and headers. UserError where
    they are not there."""
    if config.data.source == "synthetic":
        schema = synthetic.schema(config.data.synthetic)
    elif config.data.source in ("table", "kafka"):
        schema = table.load(config.data.schema_file).table_schema
    else:
        schema = SOURCES[config.data.source](config).schema
    return with_table_rows(schema, config.data.table_rows)


def _stream(
    config: Config,
    writer: StreamWriter,
    source: RawSource,
    progress: Progress | None,
) -> dict[str, Any]:
    """Read, encode, cut, write."""
    packer = Packer(source, drop_duplicates=config.data.duplicates == "drop")
    file_rows = part_rows(source, config.data.memory_mb) if config.data.window.by == "file" else ()
    cutter = WindowCutter(writer, config.data.window, source.name, progress, file_rows)
    with closing(read(source, config.data.memory_mb, config.folder / "prepare.tmp")) as tables:
        for raw in tables:
            rows = packer.encode(raw)
            kept_N = packer.kept(rows)
            room = (config.data.max_rows or cutter.rows + len(rows)) - cutter.rows
            end = len(rows) if room >= kept_N.sum() else int(kept_N.cumsum().searchsorted(room)) + 1
            cutter.add(rows.take(slice(0, end)), kept_N[:end])
            if cutter.rows == config.data.max_rows:
                break
    cutter.finish()
    return cutter.statistics() | {"tables": packer.collisions.statistics()}


def _settings(
    config: Config,
    schema: Schema,
    source: RawSource | None,
) -> dict[str, Any]:
    """All that the content of the stream depends on, as JSON."""
    data = _content(config)
    files = source.fingerprint() if source else []
    seed = config.seed if source and source.seeded else None
    return {
        "format": FORMAT,
        "schema": schema.model_dump(mode="json"),
        "data": data,
        "seed": seed,
        "files": files,
    }


def _content(config: Config) -> dict[str, Any]:
    """The settings of `data` on which the content of the stream depends, as JSON."""
    data = config.data
    excluded = (
        NOT_CONTENT
        | (set() if data.source == "synthetic" else {"synthetic"})
        | (set() if data.delayed else LATE)
        | {"follow"}
    )
    content = _former_names(data.model_dump(mode="json", exclude=excluded)) | (
        {"attribution_s": data.delayed} if data.delayed else {}
    )
    if data.follow:
        content["follow"] = {"lateness_s": data.follow.lateness_s} | (
            {"topic": data.follow.kafka.topic} if data.follow.kafka else {}
        )
    return content


def _former_names(content: dict[str, Any]) -> dict[str, Any]:
    """The names under which streams on disk hold these settings: `embedded` is the synthetic
    source."""
    former = {"synthetic": "embedded"}
    renamed = {former.get(key, key): value for key, value in content.items()}
    return renamed | {"source": former.get(content["source"], content["source"])}


def _writer(
    config: Config,
    root: AnyPath,
    schema: Schema,
    settings: dict[str, Any],
) -> StreamWriter:
    data = config.data
    if data.delayed:
        return LabeledWriter(
            root, schema, settings, data.fragment_rows, data.delayed, data.late_labels
        )
    return StreamWriter(root, schema, settings, data.fragment_rows)


def _check_tasks(config: Config, schema: Schema) -> None:
    for task in config.data.attribution_s:
        if task not in schema.tasks:
            way_out = nearest(task, schema.tasks) or f" There are {', '.join(schema.tasks)}."
            raise UserError(f"setting 'data.attribution_s': unknown task '{task}'.{way_out}")


def _check_attribution(
    config: Config,
    schema: Schema,
    source: RawSource | None,
) -> None:
    """UserError where labels of a task cannot come late."""
    told = source.label_time_tasks if source else synthetic.TASKS
    _check_tasks(config, schema)
    if config.data.delayed and (
        config.data.window.by == "file" or (source and source.ordered_only)
    ):
        raise UserError(
            f"setting 'data.attribution_s' needs times, and the windows of '{config.data.source}' are static: a set without time or cut by "
            "files has all its labels at once; remove the setting"
        )
    for task in config.data.delayed:
        if task not in told:
            raise UserError(
                f"setting 'data.attribution_s.{task}': '{config.data.source}' does not tell when its label became known"
                + (
                    f"; it does for {', '.join(told)}"
                    if told
                    else "; a `table` source does with `label_time` in the schema file"
                )
            )


def _finished_elsewhere(root: AnyPath, config: Config) -> bool:
    """Whether the stream is complete and its raw data are not on this machine: then the settings
    alone decide."""
    if (
        config.data.source == "synthetic"
        or config.data.root.is_dir()
        or not (root / "manifest.json").exists()
    ):
        return False
    made = read_json(root / "settings.json")
    return bool(
        (made["format"], made["data"]) == (FORMAT, _content(config))
        and made["seed"] in (None, config.seed)
    )


def _check_windows(config: Config, source: RawSource | None) -> None:
    if source and source.ordered_only and config.data.window.by == "time":
        raise UserError(
            f"setting 'data.window.by' is 'time', but the data of '{config.data.source}' have only an order, no times: "
            "set data.window.by=rows and data.window.rows"
        )
    if config.data.window.by == "file" and not (source and source.parts):
        raise UserError(
            f"setting 'data.window.by' is 'file', but the events of '{config.data.source}' do not follow one another file by file: "
            "set data.window.by to time or rows"
        )


def remove_uncommitted(root: AnyPath) -> None:
    """Remove what a killed preparation left unfinished; committed windows stay."""
    committed = {path.parent for path in root.glob("window=*/manifest.json")}
    for folder in root.glob("window=*"):
        if folder not in committed:
            remove_tree(folder)
    if isinstance(root, Path):  # elsewhere files are put in one step
        for temporary in (*root.glob(".*.tmp"), *root.glob("*/.*.tmp"), *root.glob("*/*/.*.tmp")):
            temporary.unlink()


@contextmanager
def rollback_on_error(root: AnyPath) -> Iterator[None]:
    """On a UserError take back what this preparation wrote: the raw data will be corrected and
    prepared anew. Where remote files cannot be written, neither can they be deleted: what is there
    stays, to go on from."""
    before: set[AnyPath] = set(root.rglob("*"))
    try:
        yield
    except StorageError:
        raise
    except UserError:
        there: set[AnyPath] = set(root.rglob("*"))
        for path in sorted(there - before, key=str, reverse=True):
            path.rmdir() if isinstance(path, Path) and path.is_dir() else path.unlink()
        if isinstance(root, Path) and not before and root.is_dir():
            root.rmdir()
        raise
