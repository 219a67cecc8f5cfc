"""The settings on which the content of a stream depends, as stored in `<stream>/settings.json`."""

from __future__ import annotations

from typing import Any

from exfm_ray.config.root import Config
from exfm_ray.data.sources.base import RawSource
from exfm_ray.schema import Schema
from exfm_ray.storage.atomic import read_json
from exfm_ray.storage.remote import AnyPath

FORMAT = 1  # raise it when the same raw data would become other rows

# Settings that do not change the content, or that the schema and the fingerprints cover.
NOT_CONTENT = {"memory_mb", "root", "schema_file", "follow"}
# Content only of streams in which labels come late.
LATE = {"attribution_s", "late_labels"}
FORMER_NAMES = {"synthetic": "embedded"}
"""Current name -> the name in streams on disk."""


def stream_settings(
    config: Config,
    schema: Schema,
    source: RawSource | None,
) -> dict[str, Any]:
    """Everything that the content of the stream depends on, as JSON."""
    seeded = source is not None and source.seeded
    return {
        "format": FORMAT,
        "schema": schema.model_dump(mode="json"),
        "data": _content(config),
        "seed": config.seed if seeded else None,
        "files": source.fingerprint() if source else [],
    }


def is_stream_of(root: AnyPath, config: Config) -> bool:
    """True when the stream in `root` has the settings of `config`, whatever its raw files are."""
    stored = read_json(root / "settings.json")
    return (
        stored["format"] == FORMAT
        and stored["data"] == _content(config)
        and stored["seed"] in (None, config.seed)
    )


def _content(config: Config) -> dict[str, Any]:
    """The settings of `data` on which the content of the stream depends, as JSON."""
    data = config.data
    excluded = set(NOT_CONTENT)
    if data.source != "synthetic":
        excluded.add("synthetic")
    if not data.delayed:
        excluded |= LATE
    dumped = data.model_dump(mode="json", exclude=excluded)
    content = _with_former_names(dumped)
    if data.delayed:
        content["attribution_s"] = data.delayed
    if data.follow:
        kafka = data.follow.kafka
        follow: dict[str, Any] = {"lateness_s": data.follow.lateness_s}
        if kafka:
            follow["topic"] = kafka.topic
        content["follow"] = follow
    return content


def _with_former_names(content: dict[str, Any]) -> dict[str, Any]:
    """Replace names by those that streams on disk use."""
    renamed = {}
    for key, value in content.items():
        former_key = FORMER_NAMES.get(key, key)
        renamed[former_key] = value
    source = content["source"]
    former_source = FORMER_NAMES.get(source, source)
    renamed["source"] = former_source
    return renamed
