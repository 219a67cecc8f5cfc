"""Labeling specs, streams and snapshots for the tests of the DAS."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from example import SCHEMA, make_stream
from publish_snapshots import publish

from exfm_ray.config.das import DASConfig
from exfm_ray.das.scorer import Scorer
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.data.stream import EventStream
from exfm_ray.storage.remote import AnyPath
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.stores.supervision import SupervisionStore

BATCH = 150


def make_spec(
    folder: AnyPath,
    store: str = "supervision",
    log: Path | None = None,
    **das: Any,
) -> LabelingSpec:
    """Return a spec for <folder>/stream with the snapshots in <folder>/snapshots.

    Args:
        folder: local or remote.
        store: name of the folder for supervision.
        log: a local path for the log, needed if `folder` is remote.
        das: settings.
    """
    settings = DASConfig(batch_size=BATCH, threads=1, **das)
    supervision = SupervisionStore(folder / store, "fm")
    log = log or Path(str(folder)) / store / "timeline.jsonl"
    return LabelingSpec(
        folder / "stream",
        SnapshotStore(folder / "snapshots", "fm"),
        supervision,
        settings,
        log,
        False,
    )


def make_place(
    folder: AnyPath,
    windows: int = 3,
    rows: int = 1000,
    fragment_rows: int = 400,
    versions: int | None = None,
) -> AnyPath:
    """Write a stream and snapshots 1 to `versions` into a folder.

    By default the last version is the last window's number.
    """
    make_stream(folder / "stream", windows, rows, fragment_rows)
    last = windows - 1 if versions is None else versions
    for version in range(1, last + 1):
        publish(folder / "snapshots", version)
    return folder


def written(spec: LabelingSpec) -> dict[str, bytes]:
    """Return all files of the supervision by path, without the list of failed fragments and the
    log."""
    root = spec.store.root / spec.store.teacher
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in sorted(root.glob("window=*/*"), key=str)
    }


def scored(spec: LabelingSpec) -> list[AnyPath]:
    """Return the files that are complete now, while actors write."""
    return sorted((spec.store.root / spec.store.teacher).glob("window=*/[!.]*"), key=str)


def undisturbed(spec: LabelingSpec) -> dict[str, bytes]:
    """Return what one scorer in this process writes into another store, window by window."""
    other = replace(spec, store=replace(spec.store, root=spec.store.root.with_name("undisturbed")))
    stream = EventStream.open(spec.stream_root)
    scorer = Scorer(other)
    for window in stream.windows():
        version = spec.policy.version(window)
        if version is not None and spec.snapshots.has(version):
            manifest = stream.window(window)
            for fragment in manifest.fragments:
                scorer.score(window, fragment, version)
            other.store.commit(manifest, version, SCHEMA.tasks, spec.policy)
    return written(other)
