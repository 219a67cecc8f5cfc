"""Labels that come after their events: what is released of a window, task by task, and how readers
join it.

A stream with `data.attribution_s` keeps two logs. Fragments hold the events, with NaN for labels
that are still to come; the label log holds what came, and when. Once a window's attribution time is
over it is *released* for the task: the labels as they are known then are written beside its
fragments, for good.

    <stream>/labels.json                                      seconds of attribution by task, and what is done with late labels
    <stream>/labels/part=000003.parquet                       the label log: example_id, task, label (1), time_ms
    <stream>/window=003/released=click/fragment=0000.parquet  example_id, label: row by row those of
    the fragment
    <stream>/window=003/released=click/manifest.json          last of its release
    <stream>/window=003/corrections.click.parquet             where the examples lie whose label came after their own release
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from exfm_ray.base import FrozenModel
from exfm_ray.data.stream import EventStream, Fragment, list_values, window_name
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import parquet_source, read_json
from exfm_ray.storage.manifest import read_manifest
from exfm_ray.storage.remote import AnyPath

ATTRIBUTION = "labels.json"


class ReleaseManifest(FrozenModel):
    """The manifest of a window's release for a task.

    Attributes:
        deadline_ms: end of the window plus the attribution time; labels from then on are late.
        parts: of the label log, how many had come.
        late: window -> how many of its labels, late there, came before this release's deadline:
            those that `corrections` holds, where the stream delivers them.
    """

    window: int
    task: str
    deadline_ms: int
    parts: int
    rows: int
    positives: int
    late: dict[int, int]
    corrections: Fragment | None
    schema_digest: str


def attribution(root: AnyPath) -> dict[str, int]:
    """Seconds of attribution of each task whose labels come after the events; empty where all
    labels stand with the events.

    UserError for a damaged file.
    """
    path = root / ATTRIBUTION
    if not path.exists():
        return {}
    found = read_json(path)
    seconds = found.get("attribution_s") if isinstance(found, dict) else None
    if not isinstance(seconds, dict) or not all(
        isinstance(s, int) and s >= 0 for s in seconds.values()
    ):
        raise UserError(
            f"{path}: holds no `attribution_s` of tasks and seconds; it is damaged: prepare the stream again"
        )
    return seconds


def release_folder(
    root: AnyPath,
    window: int,
    task: str,
) -> AnyPath:
    """Where a window's labels of a task lie."""
    return root / window_name(window) / f"released={task}"


def release(
    stream: EventStream,
    window: int,
    task: str,
) -> ReleaseManifest:
    """The manifest of a release; UserError where it is missing, damaged or of another window, task
    or schema."""
    path = release_folder(stream.root, window, task) / "manifest.json"
    if not path.exists():
        raise UserError(
            f"{path}: window {window} is not released for task '{task}': its attribution time is not over, or prepare was interrupted"
        )
    found = read_manifest(
        path, ReleaseManifest, "the manifest of a release", "prepare the stream again"
    )
    if (found.window, found.task, found.schema_digest) != (window, task, stream.schema.digest):
        raise UserError(
            f"{path}: is of window {found.window}, task '{found.task}', or of another schema; prepare the stream again"
        )
    return found


def is_released(
    stream: EventStream,
    window: int,
    tasks: Iterable[str],
) -> bool:
    """True when the labels of all of `tasks` are final: at once, where they stand with the
    events."""
    awaited = attribution(stream.root).keys() & set(tasks)
    return stream.has(window) and all(
        (release_folder(stream.root, window, task) / "manifest.json").exists() for task in awaited
    )


def released_windows(stream: EventStream, tasks: Sequence[str]) -> list[int]:
    """The windows, from the first on, that are released for all of `tasks`."""
    found: list[int] = []
    for window in stream.windows():
        if not is_released(stream, window, tasks):
            break
        found.append(window)
    return found


def with_released_labels(
    stream: EventStream,
    window: int,
    fragment: Fragment,
    tasks: Sequence[str],
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """A fragment's packed columns with the released labels of `tasks`; those of other tasks that
    come late stay NaN.

    UserError names file and row where a release is of other examples than the fragment.
    """
    awaited = [task for task in tasks if task in attribution(stream.root)]
    if not awaited:
        return stream.read(window, fragment, columns)
    events = stream.read(window, fragment, None if columns is None else ["example_id", *columns])
    labels_NT = list_values(events["labels"], len(stream.schema.tasks)).copy()
    for task in awaited:
        labels_NT[:, stream.schema.task_index(task)] = _labels(
            stream, window, fragment, task, events["example_id"]
        )
    return with_labels(events, labels_NT)


def _labels(
    stream: EventStream,
    window: int,
    fragment: Fragment,
    task: str,
    ids: pa.ChunkedArray,
) -> np.ndarray:
    release(stream, window, task)
    path = release_folder(stream.root, window, task) / Path(fragment.file).name
    try:
        table = pq.read_table(parquet_source(path), partitioning=None, use_threads=False)
    except FileNotFoundError:
        raise UserError(
            f"{path}: the release names this file, but it is not there; prepare the stream again"
        ) from None
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path}: not a readable Parquet file ({error}); prepare the stream again"
        ) from None
    if table.column_names != ["example_id", "label"] or table.num_rows != len(ids):
        raise UserError(
            f"{path}: {table.num_rows} rows of {table.column_names} for {len(ids)} events; prepare the stream again"
        )
    wrong = pc.index(pc.equal(table["example_id"], ids), False).as_py()
    if wrong >= 0:
        found = table["example_id"][wrong]
        raise UserError(
            f"{path}: row {wrong}: label of example {found}, the event there is {ids[wrong]}; prepare the stream again"
        )
    return np.asarray(table["label"].to_numpy()).astype(np.float32)


def with_labels(events: pa.Table, labels_NT: np.ndarray) -> pa.Table:
    """The same rows with these labels, float32 (rows, tasks)."""
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(labels_NT.ravel(), pa.float32()), labels_NT.shape[1]
    )
    return events.set_column(
        events.column_names.index("labels"), events.schema.field("labels"), column
    )
