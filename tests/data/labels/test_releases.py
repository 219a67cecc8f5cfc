"""Labels that come late: what is released when, what readers see of it, and what comes too late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from small_runs import small_config

from exfm_ray.config.root import Config
from exfm_ray.data.labels.corrections import CORRECTED
from exfm_ray.data.labels.releases import (
    is_released,
    release,
    release_folder,
    released_windows,
    with_released_labels,
)
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.readers import StreamReader, WindowPass
from exfm_ray.data.sources.synthetic import START_MS, WINDOW_MS, known_times
from exfm_ray.data.stream import EventStream, list_values
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import read_json, write_json
from exfm_ray.stores.readers import AugmentedReader
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.supervision import TEACHER_COLUMN, SupervisionStore

pytestmark = pytest.mark.heavy

HOURS = {"click": 600, "conversion": 7200}
BOTH = ("click", "conversion")
WINDOWS = 8
SYNTHETIC = {"windows": WINDOWS, "events_per_window": 3000}


def make(
    folder: Path,
    name: str = "late",
    **data: Any,
) -> Config:
    """A small synthetic run whose labels come late."""
    settings = {
        "fragment_rows": 1200,
        "synthetic": SYNTHETIC,
        "attribution_s": HOURS,
        "late_labels": "correct",
    } | data
    return small_config(folder, name, data=settings)


def labels(stream: EventStream, window: int) -> np.ndarray[Any, Any]:
    """All labels of a window as readers get them."""
    return np.concatenate(
        [
            list_values(with_released_labels(stream, window, f, BOTH)["labels"], 2)
            for f in stream.window(window).fragments
        ]
    )


def truth(folder: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The same stream with all labels at once.

    Returns:
        The labels, the time at which each would be known, and its window.
    """
    stream = prepare(
        small_config(folder, "plain", data={"fragment_rows": 1200, "synthetic": SYNTHETIC})
    )
    parts = [(w, stream.read(w, f)) for w in stream.windows() for f in stream.window(w).fragments]
    labels_NT = np.concatenate([list_values(table["labels"], 2) for _, table in parts])
    times_N = np.concatenate([table["event_time"].to_numpy() for _, table in parts])
    window_N = (times_N - START_MS) // WINDOW_MS
    known_NT = np.concatenate(
        [known_times(0, w, 0, times_N[window_N == w]) for w in range(WINDOWS)]
    )
    return labels_NT, known_NT, window_N


def test_released_labels_are_those_known_by_the_deadline(tmp_path: Path) -> None:
    """Wrong: a release holds labels from after its deadline, misses some from before, or the
    events differ from those without attribution."""
    stream = prepare(make(tmp_path))
    labels_NT, known_NT, window_N = truth(tmp_path)
    plain = EventStream.open(tmp_path / "plain" / "stream")
    for window in stream.windows():
        for own, other in zip(
            stream.window(window).fragments, plain.window(window).fragments, strict=True
        ):
            events = stream.read(window, own)
            assert events.drop(["labels"]).equals(plain.read(window, other).drop(["labels"]))
            assert np.isnan(list_values(events["labels"], 2)).all(), (
                "no reader can learn what is not released"
            )
        mine = window_N == window
        for column, task in enumerate(BOTH):
            deadline = START_MS + (window + 1) * WINDOW_MS + HOURS[task] * 1000
            on_time = (labels_NT[mine, column] == 1) & (known_NT[mine, column] < deadline)
            np.testing.assert_array_equal(labels(stream, window)[:, column], on_time)
            assert release(stream, window, task).positives == on_time.sum() > 0
    statistics = read_json(stream.root / "manifest.json")["labels"]
    for column, task in enumerate(BOTH):
        assert (
            statistics[task]["positives"] + sum(statistics[task]["late"].values())
            == labels_NT[:, column].sum()
        )


def test_late_labels_come_back_once_as_positives_to_learn(tmp_path: Path) -> None:
    """Wrong: a late label is lost, delivered twice or before it was known, moves the labels of
    other tasks, or is evaluated."""
    stream = prepare(make(tmp_path))
    labels_NT, known_NT, window_N = truth(tmp_path)
    reader = StreamReader(stream.root, BOTH)
    found = []
    for window in stream.windows():
        manifest = stream.window(window)
        late = [release(stream, window, task).corrections for task in BOTH]
        assert (
            list(reader.fragments(WindowPass(window, "evaluate")))
            == list(reader.fragments(WindowPass(window, "learn")))
            == list(manifest.fragments)
        )
        domains = np.zeros(4, np.int64)
        for fragment in manifest.fragments:
            rows = reader.read(WindowPass(window, "learn"), fragment)
            again_N = window_N[rows["example_id"].to_numpy()] < window
            assert rows.schema.equals(stream.schema.arrow_schema)
            assert rows.filter(pa.array(~again_N)).equals(
                reader.read(WindowPass(window, "evaluate"), fragment)
            ), "its own rows, in their order"
            values_NT = list_values(rows["labels"], 2)
            domains += np.bincount(rows["domain"].to_numpy()[again_N], minlength=4)
            for column, of_task in enumerate(late):
                mine_N = again_N & (values_NT[:, column] == CORRECTED)
                assert np.isnan(values_NT[mine_N, 1 - column]).all()
                assert (
                    abs(
                        mine_N.sum()
                        - (of_task.rows * fragment.rows / manifest.rows if of_task else 0)
                    )
                    <= 1
                ), "dealt by the fragments' rows"
                first, second = (half.sum() for half in np.array_split(mine_N, 2))
                assert abs(first - second) <= 2, "spread over the fragment"
                found += [
                    (window, column, i) for i in rows["example_id"].to_numpy()[mine_N].tolist()
                ]
        np.testing.assert_array_equal(
            domains, np.sum([f.domain_rows for f in late if f] or [[0] * 4], axis=0)
        )
    expected = []
    for column, task in enumerate(BOTH):
        for i in np.flatnonzero(labels_NT[:, column] == 1).tolist():
            deadlines = START_MS + (np.arange(WINDOWS) + 1) * WINDOW_MS + HOURS[task] * 1000
            first = int(np.searchsorted(deadlines, known_NT[i, column], "right"))
            if window_N[i] < first < WINDOWS:
                expected.append((first, column, i))
    assert sorted(found) == sorted(expected) and len(expected) > 20
    counted = prepare(make(tmp_path, "counted", late_labels="count"))
    for window in counted.windows():
        assert (
            release(counted, window, "conversion").late
            == release(stream, window, "conversion").late
        )
        assert StreamReader(counted.root, BOTH).fragments(WindowPass(window, "learn")) == list(
            counted.window(window).fragments
        )


def test_a_reader_waits_for_its_own_tasks_only(tmp_path: Path) -> None:
    """Wrong: a click model waits for conversions, a window is learned before its release, or the
    DAS waits for labels."""
    stream = prepare(make(tmp_path))
    (
        release_folder(stream.root, 5, "conversion") / "manifest.json"
    ).unlink()  # as while its attribution time runs
    click = StreamReader(stream.root, ("click",))
    both = StreamReader(stream.root, BOTH)
    augmented = AugmentedReader(stream.root, None, SnapshotPolicy(1), (0,), ("conversion",))
    for purpose in ("evaluate", "learn"):
        work = WindowPass(5, purpose)  # type: ignore[arg-type]
        assert click.ready(work) and not both.ready(work) and not augmented.ready(work)
    assert (
        released_windows(stream, BOTH) == [0, 1, 2, 3, 4]
        and released_windows(stream, ("click",)) == stream.windows()
    )
    fragment = stream.window(5).fragments[0]
    with pytest.raises(UserError, match="window 5 is not released for task 'conversion'"):
        both.read(WindowPass(5, "evaluate"), fragment)
    assert np.isnan(list_values(click.read(WindowPass(5, "evaluate"), fragment)["labels"], 2)).all(
        axis=0
    ).tolist() == [False, True]
    assert stream.read(5, fragment).num_rows == fragment.rows, "what the DAS reads"


def test_corrections_carry_their_own_supervision(tmp_path: Path) -> None:
    """Wrong: a correction is learned with the supervision of another example or window, or blocks
    if its window had no teacher."""
    stream = prepare(make(tmp_path))
    store = SupervisionStore(tmp_path / "supervision", "fm")
    for window in stream.windows()[1:]:
        for fragment in stream.window(window).fragments:
            ids = stream.read(window, fragment, ["example_id"])["example_id"]
            store.write(
                window,
                fragment,
                ids,
                window,
                {"conversion": (ids.to_numpy() % 97 / 100).astype(np.float32)},
            )
        store.commit(stream.window(window), window, ("conversion",), SnapshotPolicy(1))
    reader, plain = (
        AugmentedReader(stream.root, s, SnapshotPolicy(1), (0, 2), ("conversion",))
        for s in (store, None)
    )
    untaught = taught = 0
    for window in stream.windows()[1:]:
        for fragment in reader.fragments(WindowPass(window, "learn")):
            rows = reader.read(WindowPass(window, "learn"), fragment)
            both = (rows, plain.read(WindowPass(window, "learn"), fragment))
            rows, more = (
                table.filter(pc.less(table["event_time"], START_MS + window * WINDOW_MS))
                for table in both
            )
            np.testing.assert_allclose(
                list_values(rows[TEACHER_COLUMN], 1)[:, 0],
                rows["example_id"].to_numpy() % 97 / 100,
                rtol=1e-6,
            )
            assert (
                set(rows["domain"].to_pylist()) <= {0, 2}
                and (rows["event_time"].to_numpy() >= START_MS + WINDOW_MS).all()
            )
            taught = taught + rows.num_rows
            untaught = untaught + more.num_rows - rows.num_rows
    assert taught > 5 and untaught > 0, (
        "corrections of window 0, which had no teacher, are left out with one"
    )


def test_a_window_without_events_brings_its_corrections(tmp_path: Path) -> None:
    """Wrong: corrections are lost if there are no events to mix them with."""
    stream = prepare(make(tmp_path))
    late = release(stream, 4, "conversion").corrections
    assert late is not None
    empty = stream.window(4).model_copy(update={"rows": 0, "fragments": ()})
    write_json(stream.root / "window=004" / "manifest.json", empty.model_dump(mode="json"))
    for reader in (
        StreamReader(stream.root, ("conversion",)),
        AugmentedReader(stream.root, None, SnapshotPolicy(1), (0, 1, 2, 3), ("conversion",)),
    ):
        assert not reader.fragments(WindowPass(4, "evaluate"))
        (fragment,) = reader.fragments(WindowPass(4, "learn"))
        rows = reader.read(WindowPass(4, "learn"), fragment)
        assert (
            rows.num_rows == late.rows and (list_values(rows["labels"], 2)[:, 1] == CORRECTED).all()
        )


def test_a_killed_preparation_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a kill between a window and its releases changes what is released, or leaves a release
    half done for good."""
    import exfm_ray.data.labels.label_log as ledger

    whole = prepare(make(tmp_path, "whole"))
    written = ledger.write_json
    for survives in (1, 4, 7):
        left = [survives]

        def dies(
            path: Path,
            value: Any,
            left: list[int] = left,
        ) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            written(path, value)

        monkeypatch.setattr(ledger, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(make(tmp_path, f"killed{survives}"))
        monkeypatch.setattr(ledger, "write_json", written)
        again = prepare(make(tmp_path, f"killed{survives}"))
        files = {
            p.relative_to(whole.root): p.read_bytes() for p in whole.root.rglob("*") if p.is_file()
        }
        assert {
            p.relative_to(again.root): p.read_bytes() for p in again.root.rglob("*") if p.is_file()
        } == files


def test_damage_is_named(tmp_path: Path) -> None:
    """Wrong: labels of other examples are learned without an error."""
    stream = prepare(make(tmp_path))
    fragment = stream.window(2).fragments[0]
    path = release_folder(stream.root, 2, "click") / fragment.file
    table = pq.read_table(path, partitioning=None)
    pq.write_table(
        table.set_column(0, "example_id", pa.array(np.roll(table["example_id"].to_numpy(), 1))),
        path,
    )
    with pytest.raises(UserError, match=r"released=click.*row 0: label of example"):
        StreamReader(stream.root, BOTH).read(WindowPass(2, "learn"), fragment)
    path.unlink()
    with pytest.raises(UserError, match="not there"):
        StreamReader(stream.root, BOTH).read(WindowPass(2, "learn"), fragment)
    for damaged in ([], {}, {"attribution_s": None}, {"attribution_s": {"click": "x"}}):
        write_json(stream.root / "labels.json", damaged)
        with pytest.raises(
            UserError,
            match=r"labels.json: holds no `attribution_s` of tasks and seconds; "
            r".* prepare the stream again",
        ):
            StreamReader(stream.root, BOTH).ready(WindowPass(2, "learn"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"attribution_s": {"clik": 5}}, r"data\.attribution_s.*unknown task 'clik'.*click"),
        ({"attribution_s": {"click": -1}}, "greater than or equal to 0"),
        ({"follow": {}}, "data.source=table"),
    ],
)
def test_mistakes_at_the_door(
    tmp_path: Path,
    data: dict[str, Any],
    message: str,
) -> None:
    """Wrong: a mistake in the settings shows up late or not at all, or its message does not say
    what to do."""
    with pytest.raises((UserError, ValueError), match=message):
        prepare(make(tmp_path, **{"attribution_s": {"click": 600}} | data))


def test_a_static_set_has_no_late_labels(tmp_path: Path) -> None:
    """Wrong: passes over a static set wait for labels that no clock releases."""
    with pytest.raises(ValueError, match=r"fm.static is set.*data.attribution_s"):
        small_config(
            tmp_path,
            "static",
            data={"attribution_s": {"click": 5}},
            fm={"static": {}},
            vm={"models": []},
        )


def test_streams_without_attribution_are_as_before(tmp_path: Path) -> None:
    """Wrong: a stream whose labels stand with their events gets other settings or files, and is
    refused by a run that holds it."""
    stream = prepare(make(tmp_path, "plain", attribution_s={"click": 0}, late_labels="count"))
    made = read_json(stream.root / "settings.json")["data"]
    assert not {"attribution_s", "late_labels", "follow"} & set(made)
    assert not (stream.root / "labels").exists() and not (stream.root / "labels.json").exists()
    assert (
        is_released(stream, 0, BOTH)
        and not np.isnan(
            list_values(stream.read(0, stream.window(0).fragments[0])["labels"], 2)
        ).any()
    )
