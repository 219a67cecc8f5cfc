"""Raw data to an event stream: `prepare(config)`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from exfm_ray.config import Config
from exfm_ray.data.prepare import avazu, criteo, embedded, frappe, kuairand, movielens, table
from exfm_ray.data.prepare.cutter import Cutter, Progress
from exfm_ray.data.prepare.pack import Packer
from exfm_ray.data.prepare.reader import part_rows, read
from exfm_ray.data.prepare.source import RawSource, with_table_rows
from exfm_ray.data.stream import EventStream, StreamWriter
from exfm_ray.errors import UserError
from exfm_ray.files import read_json
from exfm_ray.schema import Schema

__all__ = ["prepare", "source_schema", "stream_folder"]

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


def stream_folder(config: Config) -> Path:
    """Where a run's stream lies."""
    return config.folder / "stream"


def prepare(config: Config, progress: Progress | None = None, check: Callable[[Schema], None] | None = None) -> EventStream:
    """Turn the raw data of `config.data` into the event stream `<run>/stream`, window by window.

    A complete stream with the same settings is returned as it is. After an interruption the windows committed before are
    left alone, what their events leave behind (history, normaliser, numbers) is computed again, and the files come out the
    same. Memory does not depend on the size of the input.

    Args:
        config: the run; `data`, `seed` and the run's folder are read.
        progress: called with (window, rows) when a window is done.
        check: called with the stream's schema before anything is written; raises where the run does not fit it.

    Raises:
        UserError: the raw data or the settings are at fault; names the file, column and value, and the way out. What was in
            the folder before is untouched and nothing new is left there.
    """
    root = stream_folder(config)
    if _finished_elsewhere(root, config):
        return EventStream.open(root)
    source = None if config.data.source == "embedded" else SOURCES[config.data.source](config)
    schema = with_table_rows(source.schema if source else embedded.schema(config.data.embedded), config.data.table_rows)
    source = replace(source, schema=schema) if source else None
    _check_windows(config, source)
    if check:
        check(schema)
    with _undone_on_error(root):
        writer = StreamWriter(root, schema, _settings(config, schema, source), config.data.fragment_rows)
        stream = EventStream(root, schema)
        if not stream.complete:
            _sweep(root)
            statistics = _stream(config, writer, source, progress) if source else embedded.write(config, writer, progress)
            writer.finish(statistics)
    return stream


def source_schema(config: Config) -> Schema:
    """The schema that a stream of `config.data` will have. No data are read: a `table` source needs its schema file alone, the other raw
    sources their files' names and headers. UserError where they are not there."""
    if config.data.source == "embedded":
        schema = embedded.schema(config.data.embedded)
    elif config.data.source == "table":
        schema = table.load(config.data.schema_file).table_schema
    else:
        schema = SOURCES[config.data.source](config).schema
    return with_table_rows(schema, config.data.table_rows)


def _stream(config: Config, writer: StreamWriter, source: RawSource, progress: Progress | None) -> dict[str, Any]:
    """Read, encode, cut, write."""
    packer = Packer(source, drop_duplicates=config.data.duplicates == "drop")
    file_rows = part_rows(source, config.data.memory_mb) if config.data.window.by == "file" else ()
    cutter = Cutter(writer, config.data.window, source.name, progress, file_rows)
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


def _settings(config: Config, schema: Schema, source: RawSource | None) -> dict[str, Any]:
    """All that the content of the stream depends on, as JSON."""
    data = config.data.model_dump(mode="json", exclude=NOT_CONTENT | (set() if source is None else {"embedded"}))
    files = source.fingerprint() if source else []
    seed = config.seed if source and source.seeded else None
    return {"format": FORMAT, "schema": schema.model_dump(mode="json"), "data": data, "seed": seed, "files": files}


def _finished_elsewhere(root: Path, config: Config) -> bool:
    """Whether the stream is complete and its raw data are not on this machine: then the settings alone decide."""
    if config.data.source == "embedded" or config.data.root.is_dir() or not (root / "manifest.json").exists():
        return False
    made = read_json(root / "settings.json")
    data = config.data.model_dump(mode="json", exclude=NOT_CONTENT | {"embedded"})
    return bool((made["format"], made["data"]) == (FORMAT, data) and made["seed"] in (None, config.seed))


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


def _sweep(root: Path) -> None:
    """Remove what a killed preparation left unfinished; committed windows stay."""
    for folder in root.glob("window=*"):
        if not (folder / "manifest.json").exists():
            shutil.rmtree(folder)
    for temporary in (*root.glob(".*.tmp"), *root.glob("*/.*.tmp")):
        temporary.unlink()


@contextmanager
def _undone_on_error(root: Path) -> Iterator[None]:
    """On a UserError take back what this preparation wrote: the raw data will be corrected and prepared anew."""
    before = set(root.rglob("*"))
    try:
        yield
    except UserError:
        for path in sorted(set(root.rglob("*")) - before, reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if not before and root.is_dir():
            root.rmdir()
        raise
