"""Followed streams: files that come while a process follows, kills, disorder, and what is
refused."""

from __future__ import annotations

import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from following import HOUR_MS, contents, expected, followed, lay_out, make_log, put
from hypothesis import given, settings
from hypothesis import strategies as st

from exfm_ray.data.labels.releases import release, with_released_labels
from exfm_ray.data.prepare.prepare import follow
from exfm_ray.data.stream import EventStream, list_values
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import read_json

pytestmark = pytest.mark.heavy

ATTRIBUTION = {"click": 600, "buy": 7200}


def delivered(stream: EventStream) -> dict[str, list[dict[int, int]]]:
    """The labels that each window delivers.

    Returns:
        task -> for each window the ids of its labels, each with the window of its event.
    """
    found: dict[str, list[dict[int, int]]] = {task: [] for task in ATTRIBUTION}
    for task, windows in found.items():
        column = stream.schema.task_index(task)
        for window in stream.windows():
            tables = [
                with_released_labels(stream, window, f, (task,))
                for f in stream.window(window).fragments
            ]
            ids = [
                t["example_id"].to_numpy()[list_values(t["labels"], 3)[:, column] == 1]
                for t in tables
            ]
            mine = dict.fromkeys(np.concatenate(ids).tolist(), window)
            if late := release(stream, window, task).corrections:
                places = pq.read_table(stream.path(window, late), partitioning=None)
                mine |= dict(
                    zip(places["example_id"].to_pylist(), places["window"].to_pylist(), strict=True)
                )
            windows.append(mine)
    return found


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), pieces=st.integers(1, 6), jitter_ms=st.integers(0, 900_000))
def test_arrival_order_does_not_matter(
    seed: int,
    pieces: int,
    jitter_ms: int,
) -> None:
    """Wrong: within the allowed lateness, the order in which events and labels come changes what is
    learned, or when."""
    events, labels = make_log(4, 25, seed)
    rng = np.random.default_rng(seed)
    order = np.argsort(events["at"].to_numpy() + rng.integers(0, jitter_ms + 1, events.num_rows))
    with TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(
            folder,
            events.take(pa.array(order)),
            labels.take(pa.array(rng.permutation(labels.num_rows))),
            pieces,
        )
        stream = follow(followed(folder))
        at = np.sort(events["at"].to_numpy())
        read = [stream.read(w, f) for w in stream.windows() for f in stream.window(w).fragments]
        np.testing.assert_array_equal(
            np.concatenate([t["event_time"].to_numpy() for t in read]), at
        )
        assert delivered(stream) == expected(events, labels, 4, ATTRIBUTION)
        assert read_json(stream.root / "manifest.json")["late_events"] == 0


class Killed(BaseException):
    """Simulates a kill: no handler catches it, and nothing runs afterwards."""


@pytest.mark.parametrize("writes", [6, 11, 19])
def test_a_killed_follower_goes_on_with_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writes: int,
) -> None:
    """Wrong: after a kill at any write, events or labels are lost or doubled, or windows differ
    from those of an undisturbed run."""
    events, labels = make_log(5, 30, 7)
    lay_out(tmp_path, events, labels, 7)
    whole = follow(followed(tmp_path, "whole"))
    replace = Path.replace
    left = [writes]

    def dies(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return replace(self, target)

    for _ in range(3):  # three times in a row, each some writes further
        left[0] = writes
        monkeypatch.setattr(Path, "replace", dies)
        with pytest.raises(Killed):
            follow(followed(tmp_path, "killed"))
        monkeypatch.setattr(Path, "replace", replace)
    assert contents(follow(followed(tmp_path, "killed")).root) == contents(whole.root)


def test_files_come_while_it_follows(tmp_path: Path) -> None:
    """Wrong: windows wait for the end, labels are released before their time, or a window is
    visible before the watermark has passed it."""
    events, labels = make_log(4, 40, 3)
    put(
        tmp_path / "raw",
        "events_0.parquet",
        events.filter(pa.array(events["at"].to_numpy() < HOUR_MS + 1000)),
    )
    config = followed(tmp_path, follow={"labels": "labels_*.parquet", "poll_s": 0.05})
    thread = threading.Thread(target=follow, args=(config,), daemon=True)
    thread.start()
    root = config.folder / "stream"

    def until(path: str) -> None:
        deadline = threading.Event()
        for _ in range(600):
            if (root / path).exists():
                return
            deadline.wait(0.05)
        raise AssertionError(f"{path} did not come; there are {sorted(contents(root))}")

    rest = events["at"].to_numpy()
    put(tmp_path / "raw", "labels_0.parquet", labels)
    put(
        tmp_path / "raw",
        "events_1.parquet",
        events.filter(pa.array((rest >= HOUR_MS + 1000) & (rest < HOUR_MS + 1_000_000))),
    )
    until("window=000/manifest.json")
    stream = EventStream.open(root)
    assert stream.windows() == [0] and not stream.complete
    put(
        tmp_path / "raw",
        "events_2.parquet",
        events.filter(pa.array((rest >= HOUR_MS + 1_000_000) & (rest < 2 * HOUR_MS + 2_000_000))),
    )
    until("window=001/released=click/manifest.json")
    assert not (root / "window=000" / "released=buy").exists(), (
        "its attribution time is over two hours after the window"
    )
    put(
        tmp_path / "raw",
        "events_3.parquet",
        events.filter(pa.array(rest >= 2 * HOUR_MS + 2_000_000)),
    )
    (tmp_path / "raw" / "_END").touch()
    until("manifest.json")
    thread.join(20)
    assert delivered(stream) == expected(events, labels, 4, ATTRIBUTION)


def test_late_events_are_counted_and_labels_may_be_late_by_arrival(tmp_path: Path) -> None:
    """Wrong: an event of a committed window is put into another one, or a label that comes after
    its release is lost or counted twice."""
    events, labels = make_log(4, 40, 5)
    at = events["at"].to_numpy()
    straggler = events.filter(pa.array(at < HOUR_MS)).slice(0, 3)
    lay_out(
        tmp_path,
        pa.concat_tables(
            [
                events.filter(
                    pa.array(~np.isin(events["id"].to_numpy(), straggler["id"].to_numpy()))
                ),
                straggler,
            ]
        ),
        labels.slice(0, 0),
        1,
    )
    (tmp_path / "raw" / "_END").unlink()
    config = followed(tmp_path)
    thread = threading.Thread(target=follow, args=(config,), daemon=True)
    thread.start()
    root = config.folder / "stream"
    waiting = threading.Event()
    while not (root / "window=001" / "released=click" / "manifest.json").exists():
        waiting.wait(0.05)
    click = labels.filter(pa.array(np.array(labels["task"].to_pylist()) == "click"))
    stranger = pa.table(
        {"example_id": [1], "task": ["click"], "label": pa.array([1], pa.int8()), "time_ms": [5]}
    )
    put(tmp_path / "raw", "labels_1.parquet", pa.concat_tables([click, click, stranger]))
    while not (root / "labels" / "part=000001.parquet").exists():
        waiting.wait(0.05)
    (tmp_path / "raw" / "_END").touch()
    thread.join(20)
    manifest = read_json(root / "manifest.json")
    lost = set(straggler["id"].to_pylist())
    known = {i for i in click["example_id"].to_pylist() if i not in lost}
    assert manifest["late_events"] == 3 and manifest["rows"] == 157
    stream = EventStream.open(root)
    found = delivered(stream)["click"]
    window = dict(zip(events["id"].to_pylist(), (at // HOUR_MS).tolist(), strict=True))
    assert sum(map(len, found)) == len(known) == len(set().union(*found)), "each once"
    assert not any(found[:3]), "released before any label came"
    assert all(found[3][i] == window[i] for i in found[3]) and set(found[3].values()) == {
        0,
        1,
        2,
        3,
    }
    strangers = {i for i in click["example_id"].to_pylist() if i in lost} | {1}
    assert (
        manifest["labels"]["click"]["unknown"] == len(strangers)
        and set(manifest["labels"]["click"]["unknown_ids"]) == strangers
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"example_id": [1], "task": ["click"], "time_ms": [5]}, "no column 'label'"),
        (
            {"example_id": [1], "task": ["clik"], "label": [1], "time_ms": [5]},
            "task 'clik', none of data.attribution_s",
        ),
        (
            {"example_id": [1], "task": ["click"], "label": [2], "time_ms": [5]},
            "value 2; labels are 0 or 1",
        ),
        (
            {"example_id": ["a"], "task": ["click"], "label": [1], "time_ms": [5]},
            "'example_id' is string; an integer",
        ),
        (
            {"example_id": [1, None], "task": ["click"] * 2, "label": [1, 1], "time_ms": [5, 5]},
            "1 missing values",
        ),
    ],
)
def test_bad_label_files_are_refused(
    tmp_path: Path,
    table: dict[str, Any],
    message: str,
) -> None:
    """Wrong: a label file of other columns or values is read as something else, or the message does
    not name the file."""
    events, labels = make_log(2, 10, 1)
    lay_out(tmp_path, events, labels, 1)
    put(tmp_path / "raw", "labels_9.parquet", pa.table(table))
    with pytest.raises(UserError, match=f"labels_9.*{message}"):
        follow(followed(tmp_path))


def test_what_a_folder_must_not_do(tmp_path: Path) -> None:
    """Wrong: a file whose name is not behind those taken is lost without an error, or two
    processes follow one stream."""
    events, labels = make_log(3, 20, 2)
    lay_out(tmp_path, events, labels, 2)
    (tmp_path / "raw" / "_END").unlink()
    config = followed(tmp_path)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            follow(config)
        except UserError as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    waiting = threading.Event()
    while not (config.folder / "stream" / "window=001" / "manifest.json").exists():
        waiting.wait(0.05)
    with pytest.raises(UserError, match=r"process \d+ on .* follows this stream already"):
        follow(config)
    put(tmp_path / "raw", "events_0000.parquet", events.slice(0, 1))
    thread.join(20)
    assert failed and "names that grow" in str(failed[0])


def test_windows_without_events(tmp_path: Path) -> None:
    """Wrong: a gap is accepted, or with `keep` the windows after it have other numbers than their
    times say."""
    events, labels = make_log(4, 20, 4)
    at = events["at"].to_numpy()
    lay_out(
        tmp_path,
        events.filter(pa.array((at < HOUR_MS) | (at >= 3 * HOUR_MS))),
        labels.slice(0, 0),
        1,
    )
    with pytest.raises(UserError, match="2 empty windows"):
        follow(followed(tmp_path, "strict"))
    stream = follow(followed(tmp_path, window={"by": "time", "length_s": 3600, "empty": "keep"}))
    assert [stream.window(w).rows for w in stream.windows()] == [
        (at < HOUR_MS).sum(),
        0,
        0,
        (at >= 3 * HOUR_MS).sum(),
    ]
