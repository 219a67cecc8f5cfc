"""Users' own files: the `table` source, good and bad, and what an interruption or an error leaves
behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from exfm_ray.config.root import Config
from exfm_ray.data.labels.releases import release, with_released_labels
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream, list_values
from exfm_ray.errors import UserError

MakeConfig = Callable[..., Config]
Prepare = Callable[..., EventStream]
HOURS = {"length_s": 3600, "empty": "keep"}
SPEC: dict[str, Any] = {
    "format": "csv",
    "files": "log*.csv",
    "event_time": {"column": "at", "unit": "s"},
    "domain": "place",
    "schema": {
        "features": [
            {"name": "user", "rows": 100},
            {"name": "ad", "rows": 50, "encoding": "index"},
            {"name": "words", "kind": "multi", "rows": 100, "max_length": 3},
        ],
        "dense": [{"name": "price", "transform": "log1p"}],
        "tasks": ["click"],
        "domains": ["feed", "search"],
        "group_by": "user",
    },
}
HEADER = "at,place,user,ad,words,price,click\n"
LINES = [
    "0,feed,u1,3,a|b,1.5,0\n",
    "10,search,u2,4,,2,1\n",
    "10,search,u2,4,,2,1\n",
    "4000,feed,,,a,,1\n",
    "12000,feed,u1,48,a|b|c|d,7,0\n",
]


@pytest.fixture
def run(tmp_path: Path, make: MakeConfig) -> Prepare:
    """Prepare CSV lines, or the files in the folder, with a changed schema file."""

    def go(
        lines: list[str] | None = None,
        header: str = HEADER,
        data: dict[str, Any] | None = None,
        **changes: Any,
    ) -> EventStream:
        root = tmp_path / "raw"
        root.mkdir(exist_ok=True)
        if lines is not None:
            (root / "log.csv").write_text(header + "".join(lines))
        (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SPEC | changes))
        settings: dict[str, Any] = {"window": HOURS} | (data or {})
        return prepare(make("table", root, schema_file=tmp_path / "schema.yaml", **settings))

    return go


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_csv_becomes_windows(run: Prepare) -> None:
    """Otherwise columns, windows, duplicates or missing values are not what the files say."""
    stream = run(LINES)
    windows = [stream.window(i) for i in stream.windows()]
    assert [(w.rows, w.duplicates, w.start_ms) for w in windows] == [
        (3, 1, 0),
        (1, 0, 3_600_000),
        (0, 0, 7_200_000),
        (1, 0, 10_800_000),
    ]
    last = stream.read(3, windows[3].fragments[0])
    assert (
        last["event_time"][0].as_py(),
        last["domain"][0].as_py(),
        last["example_id"][0].as_py(),
    ) == (12_000_000, 0, 4)
    assert list_values(last["sparse"], 3)[0, 1:].tolist() == [49, 1]
    assert len(last["words"][0].as_py()) == 3
    second = stream.read(1, windows[1].fragments[0])
    assert list_values(second["sparse"], 3)[0].tolist() == [0, 0, 1]
    assert list_values(second["dense"], 1)[0, 0] == 0
    assert not (stream.root.parent / "prepare.tmp").exists()


def test_parquet_gives_the_same_as_csv(
    run: Prepare,
    tmp_path: Path,
    make: MakeConfig,
) -> None:
    """Otherwise the file format changes the data."""
    stream = run(LINES)
    table = pa.table(
        {
            "at": [0, 10, 10, 4000, 12000],
            "place": ["feed", "search", "search", "feed", "feed"],
            "user": ["u1", "u2", "u2", None, "u1"],
            "ad": [3, 4, 4, None, 48],
            "words": [["a", "b"], None, None, ["a"], ["a", "b", "c", "d"]],
            "price": [1.5, 2, 2, None, 7],
            "click": [0, 1, 1, 1, 0],
        }
    )
    pq.write_table(table, tmp_path / "raw" / "log.parquet")
    (tmp_path / "p.yaml").write_text(
        yaml.safe_dump(SPEC | {"format": "parquet", "files": "log.parquet"})
    )
    other = prepare(
        make(
            "table", tmp_path / "raw", name="parquet", schema_file=tmp_path / "p.yaml", window=HOURS
        )
    )
    for window in stream.windows():
        for fragment in stream.window(window).fragments:
            assert stream.read(window, fragment).equals(other.read(window, fragment))


def test_sorting_is_stable(run: Prepare) -> None:
    """Otherwise unsorted files cannot be used, or equal times come in another order in every
    run."""
    stream = run([LINES[3], LINES[0], LINES[1], LINES[2]], sort=True)
    assert [stream.window(i).rows for i in stream.windows()] == [3, 1]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_window_for_each_file(
    run: Prepare,
    tmp_path: Path,
    kind: str,
) -> None:
    """Otherwise the rows of a static set's validation file are among those learned, or files
    are read in another order than listed."""
    (tmp_path / "raw").mkdir()
    for file, users in (("valid", ["v"]), ("train", ["t1", "t2", "t3"]), ("test", ["x1", "x2"])):
        table = pa.table(
            {
                "at": [0] * len(users),
                "place": ["feed"] * len(users),
                "user": users,
                "ad": [1] * len(users),
                "words": [""] * len(users),
                "price": [1.0] * len(users),
                "click": [0] * len(users),
            }
        )
        if kind == "csv":
            table.to_pandas().to_csv(tmp_path / "raw" / f"{file}.csv", index=False)
        else:
            pq.write_table(table, tmp_path / "raw" / f"{file}.parquet")
    files = [f"{file}.{kind}" for file in ("train", "valid", "test")]
    stream = run(
        format=kind,
        files=files,
        event_time=None,
        data={"window": {"by": "file"}, "fragment_rows": 2},
    )
    assert [stream.window(i).rows for i in stream.windows()] == [3, 1, 2]


def test_windows_by_file_need_files_in_order(run: Prepare) -> None:
    """Otherwise sorted events, which no longer follow one another file by file, are cut by the
    sizes of the files."""
    with pytest.raises(
        UserError, match=r"data\.window\.by' is 'file'.*set data\.window\.by to time or rows"
    ):
        run(LINES, sort=True, data={"window": {"by": "file"}})


def test_iso_times(run: Prepare) -> None:
    """Otherwise the most common way to write a time is refused or read in another zone."""
    lines = ["1970-01-01T01:00:00Z" + line[line.index(",") :] for line in LINES[:1]]
    stream = run(lines, event_time={"column": "at", "unit": "iso"})
    assert stream.window(0).start_ms == 3_600_000


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        (
            ["0,feed,u1,3,a,cheap,0\n"],
            {},
            r"log\.csv, line 2: column 'price' has the value 'cheap', which is not a number",
        ),
        (
            ["0,feed,u1,3.x,a,1,0\n"],
            {},
            r"log\.csv, line 2: column 'ad' has the value '3\.x', which is not an integer",
        ),
        (
            ["0,feed,u1,3,a,1,2\n"],
            {},
            r"log\.csv: label column 'click' has the value 2\.0; labels must be 0 or 1",
        ),
        (["0,feed,u1,3,a,1,\n"], {}, r"log\.csv: label column 'click' has no value"),
        (
            ["0,feed,u1,99,a,1,0\n"],
            {},
            r"log\.csv: column 'ad' has the value 99, outside \[0, 49\)",
        ),
        (
            ["0,fed,u1,3,a,1,0\n"],
            {},
            r"log\.csv: column 'domain' has the value 'fed'.*Did you mean 'feed'",
        ),
        (["9,feed,u1,3,a,1,0\n", "8,feed,u1,3,a,1,0\n"], {}, r"out of order: event 1 .*sort: true"),
        ([",feed,u1,3,a,1,0\n"], {}, r"log\.csv: event 0 has no event time"),
        (["0,feed,u1,3,a,1\n"], {}, r"log\.csv, line 2: 6 columns where 7 are expected"),
        (['0,feed,u1,3,"a,1,0\n'], {}, r"log\.csv, line 2: a quote is opened"),
        ([], {}, r"log\.csv: no events"),
        (
            ["0,feed,u1,3,a,1,0\n", "9000000000,feed,u1,3,a,1,0\n"],
            {},
            r"empty windows.*is the unit",
        ),
        (LINES, {"domain": "plce"}, r"log\.csv: no column 'plce'\. Did you mean 'place'"),
        (LINES, {"files": "lag*.csv"}, r"lag\*\.csv: no such file"),
        (
            LINES,
            {"files": "../*.csv"},
            r"key 'files.*': '\.\./\*\.csv' does not lie below data\.root; set data\.root",
        ),
        (
            LINES,
            {"files": ["log.csv", "/etc/passwd"]},
            r"'/etc/passwd' does not lie below data\.root",
        ),
        (LINES, {"sorted": True}, r"unknown key 'sorted'\. Did you mean 'sort'"),
        (LINES, {"domain": None}, r"2 domains but no `domain` column"),
        (
            LINES,
            {"schema": SPEC["schema"] | {"tasks": ["price"]}},
            r"'price' is a task and a feature",
        ),
        (
            LINES,
            {"schema": SPEC["schema"] | {"group_by": "usr"}},
            r"group_by names 'usr'.*Did you mean 'user'",
        ),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    run: Prepare,
    tmp_path: Path,
    lines: list[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    """Otherwise the user cannot find the line at fault, or half a stream is taken for a whole
    one."""
    with pytest.raises(UserError, match=message):
        run(lines, **changes)
    assert not (tmp_path / "runs" / "run" / "stream").exists()


def test_wrong_parquet_type_is_named_before_reading(run: Prepare, tmp_path: Path) -> None:
    """Otherwise text is silently hashed where a number is meant."""
    run(LINES)
    shutil.rmtree(tmp_path / "runs")
    table = pa.table(
        {
            "at": [0],
            "place": ["feed"],
            "user": ["u"],
            "ad": [1],
            "words": ["a"],
            "price": ["7"],
            "click": [0],
        }
    )
    pq.write_table(table, tmp_path / "raw" / "log.parquet")
    with pytest.raises(
        UserError, match=r"log\.parquet: column 'price' is string, the schema file needs a number"
    ):
        run(format="parquet", files="*.parquet")


def test_a_late_error_leaves_an_earlier_stream_alone(run: Prepare, tmp_path: Path) -> None:
    """Otherwise a typo in new data destroys a good stream."""
    root = run(LINES).root
    before = contents(root)
    with pytest.raises(UserError, match="another schema or other settings"):
        run([*LINES, "20000,feed,u1,3,a,cheap,0\n"])
    assert contents(root) == before


def test_prepared_once(run: Prepare, tmp_path: Path) -> None:
    """Otherwise resuming a run prepares everything again, or needs raw data that are gone."""
    root = run(LINES).root
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.parquet")}
    run(LINES)
    (tmp_path / "raw").rename(tmp_path / "elsewhere")
    stream = prepare(_config(tmp_path))
    assert {p: p.stat().st_mtime_ns for p in stream.root.rglob("*.parquet")} == before


def _config(tmp_path: Path) -> Config:
    data = {
        "source": "table",
        "root": tmp_path / "raw",
        "schema_file": tmp_path / "schema.yaml",
        "window": HOURS,
    }
    return Config.model_validate({"name": "run", "run": {"dir": tmp_path / "runs"}, "data": data})


def test_an_interrupted_run_is_finished_the_same(tmp_path: Path, make: MakeConfig) -> None:
    """Otherwise a killed run has other features (history, normalizer, numbers) than one that was
    not."""
    root = tmp_path / "raw"
    root.mkdir()
    lines = [
        f"{i * 30},{'feed' if i % 3 else 'search'},u{i % 7},{i % 40},a|b,{i % 11},{i % 2}\n"
        for i in range(1000)
    ]
    (root / "log.csv").write_text(HEADER + "".join(lines))
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SPEC))
    settings: dict[str, Any] = {
        "schema_file": tmp_path / "schema.yaml",
        "window": HOURS,
        "fragment_rows": 50,
    }
    whole = prepare(make("table", root, name="whole", **settings))

    def kill(window: int, rows: int) -> None:
        if window == 3:
            raise KeyboardInterrupt

    config = make("table", root, name="killed", **settings)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, kill)
    assert EventStream.open(config.folder / "stream").windows() == [0, 1, 2, 3]
    assert contents(prepare(config).root) == contents(whole.root)


def test_own_ids_are_kept_and_tell_duplicates(run: Prepare) -> None:
    """Otherwise examples cannot be joined with the user's own tables, or equal-looking events with
    ids of their own are lost."""
    header = "id," + HEADER
    lines = [f"{i},{LINES[1]}" for i in (7, 8, 8)]
    stream = run(lines, header=header, example_id="id", data={"duplicates": "drop"})
    window = stream.window(0)
    assert (window.rows, window.duplicates) == (2, 1)
    assert stream.read(0, window.fragments[0])["example_id"].to_pylist() == [7, 8]


def test_an_empty_window_is_refused_unless_kept(run: Prepare, tmp_path: Path) -> None:
    """Otherwise a logger that stopped for two hours goes unseen, or a quiet night cannot be
    prepared at all."""
    lines = ["0,feed,u1,3,a,1,0\n", "10800,feed,u1,3,a,1,0\n"]
    with pytest.raises(
        UserError,
        match=r"log\.csv: 2 empty windows before the event at 10800000 ms"
        r".*data\.window\.empty=keep",
    ):
        run(lines, data={"window": HOURS | {"empty": "error"}})
    assert not (tmp_path / "runs" / "run" / "stream").exists()
    assert [w.rows for stream in [run(lines)] for w in map(stream.window, stream.windows())] == [
        1,
        0,
        0,
        1,
    ]


def test_label_times_of_a_table(run: Prepare) -> None:
    """Wrong: a label that became known after its window's deadline is released, or a source without
    label times waits forever."""
    lines = [
        "0,feed,u1,3,a,1,1,600\n",
        "10,search,u2,4,,2,1,4500\n",
        "20,feed,u2,4,,2,0,\n",
        "4000,feed,u1,5,a,,1,4001\n",
    ]
    header = HEADER.replace("click\n", "click,known_at\n")
    late = {"attribution_s": {"click": 600}, "late_labels": "correct"}
    stream = run(lines, header, data=late, label_time={"click": "known_at"})
    found = [
        list_values(with_released_labels(stream, w, f, ("click",))["labels"], 1)[:, 0].tolist()
        for w in (0, 1)
        for f in stream.window(w).fragments
    ]
    assert found == [[1, 0, 0], [1]]
    assert release(stream, 1, "click").late == {0: 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "does not say when its label became known.*label_time"),
        ({"label_time": {"clic": "known_at"}}, "names 'clic', which is no task.*click"),
        (
            {"event_time": None, "label_time": {"click": "known_at"}},
            "label_time.*needs an `event_time`",
        ),
        ({"label_time": {"click": "knwn_at"}}, "no column 'knwn_at'.*known_at"),
    ],
)
def test_label_times_that_are_not_there(
    run: Prepare,
    changes: dict[str, Any],
    message: str,
) -> None:
    """Wrong: labels without a known time are waited for, or the message does not say what to
    add."""
    lines = ["0,feed,u1,3,a,1,1,600\n"]
    header = HEADER.replace("click\n", "click,known_at\n")
    with pytest.raises(UserError, match=message):
        run(lines, header, data={"attribution_s": {"click": 600}}, **changes)


def test_a_label_without_its_time(run: Prepare) -> None:
    """Wrong: a positive label of unknown time is dropped, or taken as known at once."""
    with pytest.raises(UserError, match="event 0 has label 1 for 'click' but no time"):
        run(
            ["0,feed,u1,3,a,1,1,\n"],
            HEADER.replace("click\n", "click,known_at\n"),
            data={"attribution_s": {"click": 9}},
            label_time={"click": "known_at"},
        )


@pytest.mark.parametrize("window", [{"by": "rows", "rows": 2}, {"by": "file"}])
def test_sets_without_time_have_no_late_labels(run: Prepare, window: dict[str, Any]) -> None:
    """Wrong: windows without times wait for a clock."""
    with pytest.raises(UserError, match="needs times.*static"):
        run(LINES, data={"attribution_s": {"click": 9}, "window": window}, event_time=None)
