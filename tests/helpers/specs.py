"""Orders and actors for the tests of the DAS, and a stream whose windows come one by one."""

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


def make_order(
    folder: AnyPath,
    store: str = "supervision",
    log: Path | None = None,
    **das: Any,
) -> LabelingSpec:
    """The order over <folder>/stream with the snapshots in <folder>/snapshots. `log`: for a remote
    folder."""
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
    """A folder with a stream and a snapshot for each of its windows (or `versions`)."""
    make_stream(folder / "stream", windows, rows, fragment_rows)
    for version in range(1, (windows if versions is None else versions + 1)):
        publish(folder / "snapshots", version)
    return folder


def written(order: LabelingSpec) -> dict[str, bytes]:
    """All files of the supervision, by their paths; the list of parked ones and the log left
    out."""
    root = order.store.root / order.store.teacher
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in sorted(root.glob("window=*/*"), key=str)
    }


def scored(order: LabelingSpec) -> list[AnyPath]:
    """Files that are whole by now, while actors write."""
    return sorted((order.store.root / order.store.teacher).glob("window=*/[!.]*"), key=str)


def undisturbed(order: LabelingSpec) -> dict[str, bytes]:
    """What one scorer in this process writes into a store beside, window by window."""
    other = replace(
        order, store=replace(order.store, root=order.store.root.with_name("undisturbed"))
    )
    stream = EventStream.open(order.stream_root)
    scorer = Scorer(other)
    for window in stream.windows():
        version = order.policy.version(window)
        if version is not None and order.snapshots.has(version):
            manifest = stream.window(window)
            for fragment in manifest.fragments:
                scorer.score(window, fragment, version)
            other.store.commit(manifest, version, SCHEMA.tasks, order.policy)
    return written(other)
