"""The supervision store and its reader: aligned, named, complete, never too new."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example import SCHEMA, make_stream
from hypothesis import given
from hypothesis import strategies as st

from exfm_ray.data.readers import WindowPass
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import read_json, write_json
from exfm_ray.stores.readers import AugmentedReader
from exfm_ray.stores.snapshot_policy import SnapshotPolicy, newest_allowed_version
from exfm_ray.stores.supervision import NotScoredError, SupervisionStore, teacher_values

WINDOW = 1
VERSION = 1
BAD_ROW = 7
TASKS = ("click", "conversion")


def supervise(
    stream: EventStream,
    store: SupervisionStore,
    window: int = WINDOW,
    version: int = VERSION,
) -> None:
    """Write predictions that name their row: task t of row i of a fragment is (i + t / 2) /
    1000."""
    manifest = stream.window(window)
    for fragment in manifest.fragments:
        ids = stream.read(window, fragment, ["example_id"])["example_id"]
        rows = np.arange(len(ids), dtype=np.float32)
        store.write(
            window,
            fragment,
            ids,
            version,
            {task: (rows + t / 2) / 1000 for t, task in enumerate(TASKS)},
        )
    store.commit(manifest, version, TASKS, SnapshotPolicy(1))


@pytest.fixture
def store(stream: EventStream, tmp_path: Path) -> SupervisionStore:
    store = SupervisionStore(tmp_path / "supervision", "fm")
    supervise(stream, store)
    return store


def reader(
    stream: EventStream,
    store: SupervisionStore,
    tasks: tuple[str, ...] = TASKS,
    fm_lag: int = 1,
) -> AugmentedReader:
    return AugmentedReader(stream.root, store, SnapshotPolicy(fm_lag), (0, 1, 2), tasks)


def test_joins_row_by_row(stream: EventStream, store: SupervisionStore) -> None:
    """Wrong: a row gets another row's prediction, or a task another task's; or rows of other
    domains are read."""
    for fragment in stream.window(WINDOW).fragments:
        events = stream.read(WINDOW, fragment)
        joined = AugmentedReader(
            stream.root, store, SnapshotPolicy(1), (1,), ("conversion", "click")
        ).read(WindowPass(WINDOW, "learn"), fragment)
        chosen = np.flatnonzero(events["domain"].to_numpy() == 1)
        np.testing.assert_array_equal(
            joined["example_id"].to_numpy(), events["example_id"].to_numpy()[chosen]
        )
        expected = np.stack([(chosen + 0.5) / 1000, chosen / 1000], axis=1).astype(np.float32)
        np.testing.assert_array_equal(teacher_values(joined, 2), expected)


def test_only_learning_reads_supervision(stream: EventStream, store: SupervisionStore) -> None:
    """Wrong: evaluation waits for, or sees, what the teacher says; or the first window waits for a
    teacher that it cannot have."""
    source = reader(stream, store)
    fragment = stream.window(0).fragments[0]
    assert (
        source.ready(WindowPass(2, "evaluate"))
        and not source.ready(WindowPass(2, "learn"))
        and source.ready(WindowPass(1, "learn"))
    )
    assert (
        source.ready(WindowPass(0, "learn"))
        and teacher_values(source.read(WindowPass(0, "learn"), fragment), 2) is None
    )
    assert (
        teacher_values(source.read(WindowPass(1, "evaluate"), stream.window(1).fragments[0]), 2)
        is None
    )


def put(column: str, value: object) -> Callable[[pa.Table], pa.Table]:
    """Change one value of a column."""

    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[BAD_ROW] = value
        kind = pa.string() if column == "teacher" else table[column].type
        return table.set_column(table.column_names.index(column), column, pa.array(values, kind))

    return change


def cast(column: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(
        table.column_names.index(column), column, table[column].cast(kind)
    )


TAMPERED: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "another id": (put("example_id", 5), "row 7: example_id is 5, 1007 was expected"),
    "no id": (put("example_id", None), "row 7: example_id is None, 1007 was expected"),
    "another teacher": (put("teacher", "other"), "row 7: teacher is 'other', 'fm' was expected"),
    "another snapshot": (put("snapshot", 2), "row 7: snapshot is 2, 1 was expected"),
    "NaN": (
        put("prediction:click", float("nan")),
        "row 7: prediction:click is nan, which is no probability",
    ),
    "null": (
        put("prediction:conversion", None),
        "row 7: prediction:conversion is nan, which is no probability",
    ),
    "1.5": (
        put("prediction:click", 1.5),
        "row 7: prediction:click is 1.5, which is no probability",
    ),
    "a column less": (
        lambda table: table.drop_columns(["snapshot"]),
        "column 'snapshot' is missing",
    ),
    "a task less": (
        lambda table: table.drop_columns(["prediction:click"]),
        "column 'prediction:click' is missing",
    ),
    "fewer rows": (lambda table: table.slice(0, 399), "399 rows of supervision for 400 examples"),
    "shifted": (
        lambda table: pa.concat_tables([table.slice(1), table.slice(0, 1)]),
        "row 0: example_id is 1001, 1000 was expected",
    ),
    "ids as text": (cast("example_id", pa.string()), "column 'example_id' is string, not int64"),
    "predictions as text": (
        cast("prediction:click", pa.string()),
        "column 'prediction:click' is string, not float",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_refuses_what_is_not_aligned(
    stream: EventStream,
    store: SupervisionStore,
    name: str,
) -> None:
    """Wrong: a student learns another example's prediction, another teacher's, or a number that is
    no probability (rule 4)."""
    fragment = stream.window(WINDOW).fragments[0]
    path = store.path(WINDOW, fragment)
    (change, message) = TAMPERED[name]
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)
    with pytest.raises(UserError) as caught:
        reader(stream, store).read(WindowPass(WINDOW, "learn"), fragment)
    assert f"{path}: {message}" in str(caught.value)


def test_refuses_files_that_are_missing_or_damaged(
    stream: EventStream, store: SupervisionStore
) -> None:
    """Wrong: a missing or torn file is reported as a bug of the program, or ignored."""
    first, second, _ = stream.window(WINDOW).fragments
    store.path(WINDOW, first).unlink()
    store.path(WINDOW, second).write_bytes(b"PAR1")
    for fragment, message in ((first, "it is not there"), (second, "not a readable Parquet file")):
        with pytest.raises(UserError, match=rf"{fragment.file}: .*{message}"):
            reader(stream, store).read(WindowPass(WINDOW, "learn"), fragment)
        assert not store.is_written(WINDOW, fragment, VERSION)
    with pytest.raises(
        UserError, match=r"no supervision for task 'like'; this teacher writes click, conversion"
    ):
        reader(stream, store, tasks=("like",)).read(WindowPass(WINDOW, "learn"), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"snapshot": 0}, "supervised by snapshot 0 of 'fm', but das.fm_lag = 1 asks for 1"),
        ({"snapshot": 2}, "supervised by snapshot 2 of 'fm', but das.fm_lag = 1 asks for 1"),
        ({"window": 2}, r"manifest.json: is of window 2 and teacher 'fm'"),
        ({"teacher": "other"}, r"manifest.json: is of window 1 and teacher 'other'"),
        ({"schema_digest": "0"}, "supervision is of a stream with another schema"),
        ({"rows": "many"}, "not a manifest of supervision"),
    ],
)
def test_refuses_a_stale_manifest(
    stream: EventStream,
    store: SupervisionStore,
    change: dict[str, object],
    message: str,
) -> None:
    """Wrong: a student learns from supervision of an older stream, of another lag or another
    teacher."""
    path = store.path(WINDOW, stream.window(WINDOW).fragments[0]).with_name("manifest.json")
    write_json(path, read_json(path) | change)
    with pytest.raises(UserError, match=message):
        reader(stream, store).read(WindowPass(WINDOW, "learn"), stream.window(WINDOW).fragments[0])


def test_commit_refuses_a_teacher_that_has_learned_the_window(
    stream: EventStream, store: SupervisionStore
) -> None:
    """Wrong: predictions of a snapshot that has learned the window, or a later one than the lag
    allows, become visible (rule 2)."""
    for lag, version in ((1, 3), (2, 2), (4, 1)):
        with pytest.raises(
            UserError, match=rf"must not be supervised by snapshot {version}.*das.fm_lag = {lag}"
        ):
            store.commit(stream.window(2), version, TASKS, SnapshotPolicy(lag))
    assert not store.has(2)


def test_commit_refuses_a_window_with_a_fragment_missing(
    stream: EventStream, store: SupervisionStore
) -> None:
    """Wrong: half a window becomes visible (rule 5)."""
    fragment = stream.window(2).fragments[0]
    store.write(
        2,
        fragment,
        stream.read(2, fragment)["example_id"],
        2,
        {"click": np.zeros(fragment.rows, np.float32)},
    )
    with pytest.raises(UserError, match="fragment=0001.parquet: not scored"):
        store.commit(stream.window(2), 2, ("click",), SnapshotPolicy(1))
    assert not store.has(2)


def test_commit_refuses_what_another_snapshot_has_written(
    stream: EventStream, store: SupervisionStore
) -> None:
    """Wrong: a window is committed with a fragment that a late actor has overwritten: no reader
    accepts it, and the DAS does not score it again."""
    manifest = stream.window(2)
    for fragment, version in zip(manifest.fragments, (2, 1, 2), strict=True):
        store.write(
            2,
            fragment,
            stream.read(2, fragment)["example_id"],
            version,
            {"click": np.zeros(fragment.rows, np.float32)},
        )
    with pytest.raises(
        NotScoredError, match="fragment=0001.parquet: not scored by snapshot 2"
    ) as caught:
        store.commit(manifest, 2, ("click",), SnapshotPolicy(1))
    assert caught.value.fragments == (manifest.fragments[1],) and not store.has(2)


def test_writes_no_nan(stream: EventStream, store: SupervisionStore) -> None:
    """Wrong: a teacher that has diverged writes its NaN into the training data."""
    fragment = stream.window(2).fragments[0]
    bad = np.full(fragment.rows, np.nan, np.float32)
    with pytest.raises(UserError, match="snapshot 2 of teacher 'fm' predicts NaN for task 'click'"):
        store.write(2, fragment, stream.read(2, fragment)["example_id"], 2, {"click": bad})
    assert not store.path(2, fragment).exists()


def test_an_empty_window_is_supervised(tmp_path: Path) -> None:
    """Wrong: a window without events stops the DAS or a reader."""
    stream = make_stream(tmp_path / "empty", windows=2, rows=0)
    store = SupervisionStore(tmp_path / "supervision", "fm")
    supervise(stream, store)
    assert reader(stream, store).ready(WindowPass(1, "learn")) and not reader(
        stream, store
    ).fragments(WindowPass(1, "learn"))


@given(window=st.integers(0, 10_000), lag=st.integers(1, 100))
def test_the_newest_allowed_version_has_not_learned_the_window(window: int, lag: int) -> None:
    """Wrong: a snapshot of version v, which has learned windows 0 to v - 1, has learned one later
    than window - lag (rule 2)."""
    version = newest_allowed_version(window, lag)
    if window < lag:
        assert version is None
    else:
        assert version is not None and version >= 1 and version - 1 == window - lag < window


@pytest.mark.parametrize(
    ("lag", "expected"),
    [(1, [None, 1, 2, 3, 4]), (2, [None, None, 1, 2, 3]), (4, [None, None, None, None, 1])],
)
def test_newest_allowed_version_by_hand(lag: int, expected: list[int | None]) -> None:
    """Wrong: the lag is off by one."""
    assert [newest_allowed_version(window, lag) for window in range(5)] == expected
    assert SCHEMA.tasks == TASKS


@given(
    window=st.integers(0, 300),
    lag=st.integers(1, 20),
    every=st.integers(1, 9),
    pinned=st.none() | st.integers(1, 50),
)
def test_no_policy_breaks_rule_2(
    window: int,
    lag: int,
    every: int,
    pinned: int | None,
) -> None:
    """Wrong: every k-th, or a pinned version, has learned a window later than window - lag, or a
    window has no teacher although it could have one."""
    version = SnapshotPolicy(lag, 1 if pinned else every, pinned).version(window)
    if version is None:
        assert window < lag or (pinned is not None and pinned - 1 > window - lag)
    else:
        assert (
            version >= 1
            and version - 1 <= window - lag
            and SnapshotPolicy(lag).may_supervise(version, window)
        )
        assert (
            version == pinned
            if pinned
            else ((version - 1) % every == 0 and window - lag - (version - 1) < every)
        )


def test_policies_by_hand() -> None:
    """Wrong: the third snapshot is used too early, or a pinned one for windows that it has
    learned."""
    assert [SnapshotPolicy(1, every=3).version(window) for window in range(8)] == [
        None,
        1,
        1,
        1,
        4,
        4,
        4,
        7,
    ]
    assert [SnapshotPolicy(2, pinned=2).version(window) for window in range(5)] == [
        None,
        None,
        None,
        2,
        2,
    ]
    assert not SnapshotPolicy(2).may_supervise(3, 3) and not SnapshotPolicy(2).may_supervise(1, 1)
