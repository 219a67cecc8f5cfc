"""Releases: the labels of a window that are final, task by task, and how readers join them.

A stream with `data.attribution_s` keeps two logs. Fragments hold the events, with NaN for labels
that come later; the label log holds the labels and when each became known. Once a window's
attribution time for a task is over, the window is *released* for that task: the labels known by
then are written beside its fragments and never change.

    <stream>/labels.json
        seconds of attribution by task, and what is done with late labels
    <stream>/labels/part=000003.parquet
        the label log: example_id, task, label (1), time_ms
    <stream>/window=003/released=click/fragment=0000.parquet
        example_id and label, one row for each row of the fragment
    <stream>/window=003/released=click/manifest.json
        written last of its release
    <stream>/window=003/corrections.click.parquet
        positions of the examples whose label came after their own release
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
        deadline_ms: end of the window plus the attribution time. Labels from then on are late.
        parts: parts of the label log that had come.
        late: window -> how many of its late labels came before this release's deadline. If the
            stream delivers corrections, `corrections` holds these labels.
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
    """Seconds of attribution of each task whose labels come after the events.

    Empty if all labels come with the events. Raises UserError for a damaged file.
    """
    path = root / ATTRIBUTION
    if not path.exists():
        return {}
    stored = read_json(path)
    seconds = stored.get("attribution_s") if isinstance(stored, dict) else None
    if not isinstance(seconds, dict) or not _are_seconds(seconds.values()):
        raise UserError(
            f"{path}: holds no `attribution_s` of tasks and seconds; it is damaged: "
            "prepare the stream again"
        )
    return seconds


def _are_seconds(values: Iterable[object]) -> bool:
    return all(isinstance(value, int) and value >= 0 for value in values)


def release_folder(
    root: AnyPath,
    window: int,
    task: str,
) -> AnyPath:
    """Folder of a window's labels of a task."""
    folder = root / window_name(window)
    return folder / f"released={task}"


def release(
    stream: EventStream,
    window: int,
    task: str,
) -> ReleaseManifest:
    """The manifest of a release.

    Raises:
        UserError: the manifest is missing, damaged, or of another window, task or schema.
    """
    folder = release_folder(stream.root, window, task)
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(
            f"{path}: window {window} is not released for task '{task}': "
            "its attribution time is not over, or prepare was interrupted"
        )
    manifest = read_manifest(
        path, ReleaseManifest, "the manifest of a release", "prepare the stream again"
    )
    actual = (manifest.window, manifest.task, manifest.schema_digest)
    expected = (window, task, stream.schema.digest)
    if actual != expected:
        raise UserError(
            f"{path}: is of window {manifest.window}, task '{manifest.task}', "
            "or of another schema; prepare the stream again"
        )
    return manifest


def has_release(
    root: AnyPath,
    window: int,
    task: str,
) -> bool:
    """True when a window is released for a task whose labels come after the events."""
    manifest = release_folder(root, window, task) / "manifest.json"
    return manifest.exists()


def is_released(
    stream: EventStream,
    window: int,
    tasks: Iterable[str],
) -> bool:
    """True when the window's labels of all `tasks` are final.

    Labels that come with the events are final at once.
    """
    root = stream.root
    delayed = attribution(root).keys() & set(tasks)
    if not stream.has(window):
        return False
    return all(has_release(root, window, task) for task in delayed)


def released_windows(stream: EventStream, tasks: Sequence[str]) -> list[int]:
    """The windows, from the first on, that are released for all of `tasks`."""
    released: list[int] = []
    for window in stream.windows():
        if not is_released(stream, window, tasks):
            break
        released.append(window)
    return released


def with_released_labels(
    stream: EventStream,
    window: int,
    fragment: Fragment,
    tasks: Sequence[str],
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Read a fragment's packed columns with the released labels of `tasks`.

    Labels of other tasks that come late stay NaN. Raises UserError with file and row if a release
    is of other examples than the fragment.
    """
    attribution_s = attribution(stream.root)
    delayed = [task for task in tasks if task in attribution_s]
    if not delayed:
        return stream.read(window, fragment, columns)

    with_id = None if columns is None else ["example_id", *columns]
    events = stream.read(window, fragment, with_id)
    ids = events["example_id"]
    width = len(stream.schema.tasks)
    labels_NT = list_values(events["labels"], width).copy()
    for task in delayed:
        column = stream.schema.task_index(task)
        label_N = _labels(stream, window, fragment, task, ids)
        labels_NT[:, column] = label_N
    return with_labels(events, labels_NT)


def _labels(
    stream: EventStream,
    window: int,
    fragment: Fragment,
    task: str,
    ids: pa.ChunkedArray,
) -> np.ndarray:
    """float32 (N,): the released labels of a fragment's examples."""
    release(stream, window, task)
    folder = release_folder(stream.root, window, task)
    path = folder / Path(fragment.file).name
    table = _read_release(path)
    if table.column_names != ["example_id", "label"] or table.num_rows != len(ids):
        raise UserError(
            f"{path}: {table.num_rows} rows of {table.column_names} for {len(ids)} events; "
            "prepare the stream again"
        )

    equal = pc.equal(table["example_id"], ids)
    wrong = pc.index(equal, False).as_py()
    if wrong >= 0:
        actual = table["example_id"][wrong]
        raise UserError(
            f"{path}: row {wrong}: label of example {actual}, the event there is {ids[wrong]}; "
            "prepare the stream again"
        )
    labels = table["label"].to_numpy()
    return np.asarray(labels).astype(np.float32)


def _read_release(path: AnyPath) -> pa.Table:
    try:
        source = parquet_source(path)
        return pq.read_table(source, partitioning=None, use_threads=False)
    except FileNotFoundError:
        raise UserError(
            f"{path}: the release names this file, but it is not there; prepare the stream again"
        ) from None
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path}: not a readable Parquet file ({error}); prepare the stream again"
        ) from None


def with_labels(events: pa.Table, labels_NT: np.ndarray) -> pa.Table:
    """The same rows with these labels, float32 (rows, tasks)."""
    tasks = labels_NT.shape[1]
    flat = pa.array(labels_NT.ravel(), pa.float32())
    column = pa.FixedSizeListArray.from_arrays(flat, tasks)
    position = events.column_names.index("labels")
    field = events.schema.field("labels")
    return events.set_column(position, field, column)
