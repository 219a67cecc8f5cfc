"""The built-in sources on their publishers' own files."""

from __future__ import annotations

import csv
import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from exfm_ray.config.root import Config
from exfm_ray.data.labels.releases import release, with_released_labels
from exfm_ray.data.prepare.encode import encode_values
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream, list_values
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import read_json

pytestmark = pytest.mark.heavy

Find = Callable[[str], Path]
MakeConfig = Callable[..., Config]
BY_ROWS = {"by": "rows", "rows": 2_000}
DAY_IN_CHINA = {"length_s": 86_400, "offset_s": -8 * 3600}


def everything(stream: EventStream) -> pa.Table:
    """All events of a stream; reading checks every id against its table."""
    return pa.concat_tables(
        stream.read(i, f) for i in stream.windows() for f in stream.window(i).fragments
    )


def rows_of(file: Path) -> list[dict[str, Any]]:
    """A CSV file by plain Python."""
    with file.open() as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def kuairand(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], EventStream]:
    """The KuaiRand stream, prepared once."""
    made: list[EventStream] = []

    def get(root: Path) -> EventStream:
        if not made:
            data = {"source": "kuairand", "root": root, "window": DAY_IN_CHINA}
            made.append(
                prepare(
                    Config.model_validate(
                        {"name": "k", "run": {"dir": tmp_path_factory.mktemp("runs")}, "data": data}
                    )
                )
            )
        return made[0]

    return get


def test_kuairand_has_every_impression_in_its_day_and_tab(
    kuairand: Callable[[Path], EventStream], data_set: Find
) -> None:
    """Otherwise impressions are lost, doubled by the joins, or shown on another surface, day or
    label."""
    root = data_set("kuairand_pure")
    stream = kuairand(root)
    log = rows_of(next(root.glob("log_standard_*.csv")))
    table = everything(stream)
    assert table["event_time"].to_pylist() == [int(r["time_ms"]) for r in log]
    assert table["domain"].to_pylist() == [int(r["tab"]) for r in log]
    labels = list_values(table["labels"], 3)
    assert (
        labels
        == np.array([[float(r[t]) for t in ("is_click", "long_view", "is_like")] for r in log])
    ).all()
    sparse = list_values(table["sparse"], len(stream.schema.single))
    assert (sparse[:, 0] == np.array([int(r["user_id"]) + 1 for r in log])).all()
    days = np.unique(
        (table["event_time"].to_numpy() + 8 * 3_600_000) // 86_400_000, return_counts=True
    )[1].tolist()
    windows = [stream.window(i) for i in stream.windows()]
    assert [w.rows for w in windows] == days
    assert all(w.end_ms - w.start_ms == 86_400_000 for w in windows)
    assert 0.02 < sum(w.duplicates for w in windows) / len(log) < 0.03


def test_kuairand_histories_hold_earlier_clicks_only(
    kuairand: Callable[[Path], EventStream], data_set: Find
) -> None:
    """Otherwise the model sees the click that it has to predict."""
    root = data_set("kuairand_pure")
    stream = kuairand(root)
    log = rows_of(next(root.glob("log_standard_*.csv")))
    got = everything(stream)["clicked_videos"].to_pylist()
    clicks: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for i, row in enumerate(log):
        time = int(row["time_ms"])
        if i % 7 == 0:
            assert got[i] == [video + 1 for at, video in clicks[row["user_id"]] if at < time][-20:]
        if row["is_click"] == "1":
            clicks[row["user_id"]].append((time, int(row["video_id"])))


def test_kuairand_uses_nothing_from_after_the_impression(
    kuairand: Callable[[Path], EventStream], data_set: Find
) -> None:
    """Otherwise a column that follows from the click is an input."""
    schema = kuairand(data_set("kuairand_pure")).schema
    names = {f.name for f in schema.features} | {d.name for d in schema.dense}
    after = {
        "is_click",
        "is_like",
        "is_follow",
        "is_comment",
        "is_forward",
        "is_hate",
        "long_view",
        "play_time_ms",
        "profile_stay_time",
        "comment_stay_time",
        "is_profile_enter",
    }
    assert not names & after


def test_dropping_duplicates_keeps_the_first_of_each(data_set: Find, make: MakeConfig) -> None:
    """Otherwise repetitions stay, or events that only look alike go."""
    root = data_set("kuairand_pure")
    kept, dropped = (
        prepare(make("kuairand", root, name=d, duplicates=d, max_rows=20_000, window=DAY_IN_CHINA))
        for d in ("keep", "drop")
    )
    windows = [[s.window(i) for i in s.windows()] for s in (kept, dropped)]
    assert sum(w.rows for w in windows[0]) == sum(w.rows for w in windows[1]) == 20_000
    first_kept = windows[0][1]
    first_dropped = windows[1][1]
    assert first_kept.duplicates == first_dropped.duplicates > 0
    assert first_dropped.rows == first_kept.rows - first_kept.duplicates
    table = everything(dropped)
    assert len(set(table["example_id"].to_pylist())) == len(table)


def test_criteo_values_and_order(data_set: Find, make: MakeConfig) -> None:
    """Otherwise columns are shifted, empty fields become values, or rows move."""
    root = data_set("criteo_sample")
    stream = prepare(make("criteo", root, window=BY_ROWS))
    lines = [line.split("\t") for line in (root / "train.txt").read_text().split("\n") if line]
    table = everything(stream)
    assert [stream.window(i).rows for i in stream.windows()] == [2000, 2000, 2000, 1200]
    assert list_values(table["labels"], 1)[:, 0].tolist() == [float(line[0]) for line in lines]
    sparse = list_values(table["sparse"], 27)
    first = stream.schema.features[0]
    assert (
        sparse[:, 0].tolist()
        == encode_values(pa.array([line[14] or None for line in lines]), first, "").tolist()
    )
    assert ((sparse[:, 18] == 0) == [line[32] == "" for line in lines]).all()
    raw = np.array([[float(v) if v else np.nan for v in line[1:14]] for line in lines[:2000]])
    assert np.allclose(
        list_values(table["dense"], 13)[:2000],
        np.clip(np.nan_to_num(np.sign(raw) * np.log1p(np.abs(raw))), -10, 10),
        atol=1e-5,
    )


def test_avazu_hours(data_set: Find, make: MakeConfig) -> None:
    """Otherwise the hour of the log is read as another time, or events of one hour pass for
    duplicates."""
    stream = prepare(make("avazu", data_set("avazu_sample"), window={"length_s": 3600}))
    window = stream.window(0)
    assert (window.start_ms, window.rows, window.duplicates) == (
        1_413_849_600_000,
        8087,
        0,
    )  # 2014-10-21T00:00Z


def test_frappe_order_is_the_seeds(data_set: Find, make: MakeConfig) -> None:
    """Otherwise two runs of a seed see other data, or the validation rows are mixed into the
    training rows."""
    root = data_set("frappe")
    settings: dict[str, Any] = {"window": {"by": "rows", "rows": 50_000}}
    one, again, other = (
        everything(prepare(make("frappe", root, name=n, seed=s, **settings)))
        for n, s in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one.equals(again)
    assert not one.equals(other)

    def ids(file: str) -> list[list[int]]:
        return sorted(
            [int(v) + 1 for k, v in row.items() if k != "label"] for row in rows_of(root / file)
        )

    split = len(rows_of(root / "train.csv"))
    sparse = list_values(one["sparse"], 11)[:, :10].tolist()
    assert sorted(sparse[split:]) == ids("valid.csv")


def test_movielens_likes_and_empty_years(data_set: Find, make: MakeConfig) -> None:
    """Otherwise ratings are mislabeled, or a year without events breaks the count of the
    windows."""
    root = data_set("movielens_latest_small")
    stream = prepare(make("movielens", root, window={"length_s": 7 * 86_400, "empty": "keep"}))
    ratings = rows_of(root / "ratings.csv")
    table = everything(stream)
    assert len(table) == len(ratings)
    assert list_values(table["labels"], 1).sum() == sum(float(r["rating"]) >= 4 for r in ratings)
    windows = [stream.window(i) for i in stream.windows()]
    assert [w.index for w in windows] == list(range(len(windows)))
    assert any(w.rows == 0 and not w.fragments for w in windows)
    assert all(a.end_ms == b.start_ms for a, b in itertools.pairwise(windows))


def test_a_source_without_times_needs_windows_by_rows(data_set: Find, make: MakeConfig) -> None:
    """Otherwise row numbers are cut as if they were milliseconds."""
    with pytest.raises(
        UserError, match=r"data\.window\.by.*only an order.*set data\.window\.by=rows"
    ):
        prepare(make("criteo", data_set("criteo_sample")))


def test_missing_data_say_where_they_should_be(make: MakeConfig, tmp_path: Path) -> None:
    """Otherwise a wrong folder is a traceback."""
    (tmp_path / "trian.txt").write_text("")
    with pytest.raises(
        UserError, match=r"train\.txt: no such file.*Did you mean 'trian\.txt'.*data\.root"
    ):
        prepare(make("criteo", tmp_path, window=BY_ROWS))


def test_kuairand_long_views_are_known_when_the_video_was_played(
    make: MakeConfig, data_set: Find
) -> None:
    """Wrong: a long view is released before the video has been watched for so long, one that was
    known is missing, or it becomes a feature."""
    root = data_set("kuairand_pure")
    late = {
        "attribution_s": {"long_view": 30},
        "late_labels": "correct",
        "max_rows": 6_000,
        "window": {"length_s": 1200, "empty": "keep"},
    }
    stream = prepare(make("kuairand", root, **late))
    with next(root.glob("log_standard_*.csv")).open() as handle:
        log = list(itertools.islice(csv.DictReader(handle), 6_000))
    column = stream.schema.task_index("long_view")
    delivered = 0
    for index in stream.windows():
        window = stream.window(index)
        corrected = release(stream, index, "long_view").corrections
        for fragment in window.fragments:
            table = with_released_labels(stream, index, fragment, ("long_view",))
            rows = [log[i] for i in table["example_id"].to_pylist()]
            known = [
                int(r["time_ms"]) + int(r["play_time_ms"]) < window.end_ms + 30_000 for r in rows
            ]
            expected = [
                float(r["long_view"] == "1" and k) for r, k in zip(rows, known, strict=True)
            ]
            assert list_values(table["labels"], 3)[:, column].tolist() == expected
        delivered += release(stream, index, "long_view").positives + (
            corrected.rows if corrected else 0
        )
    statistics = read_json(stream.root / "manifest.json")["labels"]["long_view"]
    assert sum(statistics["late"].values()) > 10 and delivered + statistics["undelivered"] == sum(
        r["long_view"] == "1" for r in log
    )
