"""Remote files behave as local ones do; storage that cannot be used is reported at the start, and
no message contains a secret."""

from __future__ import annotations

import pickle
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from example import SCHEMA, make_rows
from refusals import refused
from s3_server import ENVIRONMENT, S3, free_port
from small_runs import SETTINGS, merged

from exfm_ray.data.stream import EventStream, StreamWriter
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import (
    atomic_path,
    parquet_source,
    read_json,
    remove_tree,
    write_json,
    write_text,
)
from exfm_ray.storage.remote import AnyPath, RemotePath, StorageError, open_filesystem, redact_url

SECRET = "wJalrXUtnFEMI"


@pytest.fixture(params=["s3", "fsspec"])
def remote(
    request: pytest.FixtureRequest,
    s3: S3,
    tmp_path: Path,
) -> RemotePath:
    """A folder on S3, and one on a file system that only fsspec has."""
    if request.param == "s3":
        return RemotePath(s3.url(tmp_path.name))
    return RemotePath(f"memory:///{tmp_path.name}")


def observed(place: AnyPath) -> dict[str, Any]:
    """Everything that a store can learn about a folder."""

    def names(paths: Any) -> list[str]:
        return sorted(str(path).removeprefix(str(place)) for path in paths)

    file = place / "window=000" / "a.json"
    with pytest.raises(FileNotFoundError):
        (place / "none").read_bytes()
    with pytest.raises(FileNotFoundError):
        (place / "none").stat()
    with pytest.raises(FileNotFoundError):
        (place / "none").unlink()
    (place / "none").unlink(missing_ok=True)
    return {
        "exists": [
            (place / name).exists()
            for name in ("window=000", "window=000/a.json", "window=000/a.jso", "window=00", "none")
        ],
        "file": (
            file.name,
            file.parent.name,
            file.with_name("b").name,
            file.stat().st_size,
            file.read_text(),
            file.read_bytes(),
        ),
        "folders": names(place.glob("window=*")),
        "files": names(place.glob("window=*/*.json")),
        "none": names((place / "none").glob("*/*")),
        "all": names(
            path for path in place.rglob("*") if isinstance(path, RemotePath) or path.is_file()
        ),
        "equal": file == place / "window=000/a.json"
        and hash(file) == hash(place / "window=000" / "a.json"),
    }


def test_a_path_stays_below_its_root() -> None:
    """Wrong: a name in a file from elsewhere leads to another run's objects."""
    place = RemotePath("s3://bucket/runs") / "a"
    assert str(place / "b/c..d") == "s3://bucket/runs/a/b/c..d"
    for name in ("..", "../b", "b/../../c"):
        with pytest.raises(UserError, match=r"s3://bucket/runs/a: '.*' does not lie below it"):
            place / name


def lay_out(place: AnyPath) -> None:
    write_json(place / "window=000" / "a.json", {"a": "ä"})
    write_text(place / "window=000" / "deep" / "c.txt", "")
    write_json(place / "window=001" / "b.json", [1])
    write_text(place / "manifest.json", "x" * 100_000)


def test_as_a_local_folder(remote: RemotePath, tmp_path: Path) -> None:
    """Wrong: a store finds, reads or misses other files when it is remote."""
    local = tmp_path / "local"
    for place in (local, remote):
        lay_out(place)
    assert observed(remote) == observed(local)
    for place in (local, remote):
        remove_tree(place / "window=000")
        remove_tree(place / "never")
        (place / "manifest.json").unlink()
    assert (
        [path.name for path in remote.rglob("*")]
        == [path.name for path in local.rglob("*") if path.is_file()]
        == ["b.json"]
    )


def test_an_error_while_writing_leaves_what_was_there(remote: RemotePath) -> None:
    """Wrong: a failed write destroys the old file, or shows half of the new one (rule 5)."""
    path = remote / "deep" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert read_json(path) == {"a": 1}
        raise KeyError
    assert read_json(path) == {"a": 1} and not temporary.exists()
    assert [p.name for p in path.parent.glob("*")] == ["file.json"]
    with pytest.raises(UserError, match=r"none.json: no such file"):
        read_json(remote / "none.json")


def test_a_large_file_is_whole(s3: S3, tmp_path: Path) -> None:
    """Wrong: a file of several S3 parts loses one, or is visible before its upload is complete."""
    path = RemotePath(s3.url(tmp_path.name)) / "large"
    data = bytes(range(251)) * 45_000
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    assert path.stat().st_size == len(data) and abs(path.stat().st_mtime - time.time()) < 60
    assert path.read_bytes() == data and parquet_source(path).size() == len(data)
    path.download(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


def test_a_path_carries_no_secret(s3: S3, tmp_path: Path) -> None:
    """Wrong: credentials travel with a path to other nodes, or appear in its printed form."""
    path = RemotePath(s3.url(tmp_path.name)) / "stream" / "schema.json"
    write_json(path, {})
    assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"].encode() not in pickle.dumps(path)
    assert str(path) == f"s3://tests/{tmp_path.name}/stream/schema.json"
    assert read_json(pickle.loads(pickle.dumps(path))) == {}
    assert redact_url("s3://a:b@c/d?e=f") == "s3://c/d" and redact_url("a@b?c") == "a@b?c"


BAD_URLS = {
    "a folder": ("/data/runs", "is not a URL; write it as s3://bucket/prefix"),
    "a secret": (
        f"s3://AKIA:{SECRET}@tests/x",
        "holds credentials, .* put them into the environment of all nodes, for S3 "
        ".AWS_ACCESS_KEY_ID",
    ),
    "a key": (f"s3://{SECRET}@tests/x", "holds credentials"),
    "a secret option": (
        f"s3://tests/x?secret_key={SECRET}",
        "has the option 'secret_key'; known for 's3': endpoint_override, region, scheme",
    ),
    "a secret in an option": (
        f"s3://tests/x?endpoint_override=me:{SECRET}@host",
        "holds credentials in an option",
    ),
    "another's secret": (f"ftp://me:{SECRET}@host/x", "holds credentials"),
    "no bucket": ("s3:///x", "names no bucket"),
    "an unknown scheme": (
        "s4://tests/x",
        "no file system for 's4' is installed .*; s3 and gs are built in",
    ),
    "a scheme without its package": (
        "oss://tests/x",
        "no file system for 'oss' is installed .*ossfs",
    ),
}


@pytest.mark.parametrize("case", BAD_URLS)
def test_bad_urls_are_refused_with_the_config(
    case: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: a URL that cannot work is reported after minutes, or its secret is printed or
    stored."""
    url, message = BAD_URLS[case]
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(merged(SETTINGS, {"run": {"dir": str(tmp_path / "runs")}})))
    line = refused(capsys, tmp_path, "prepare", "--config", file, "--set", f"run.storage={url}")
    assert "setting 'run.storage': " in line
    assert re.search(message, line) and SECRET not in line, line


def test_storage_that_cannot_be_used_is_reported_at_the_first_request(
    s3: S3, tmp_path: Path
) -> None:
    """Wrong: a wrong bucket, address or key is a traceback, or is reported only after the time that
    an outage may last."""
    wrong_bucket = s3.url("x", bucket="testz")
    server = f"endpoint_override=127.0.0.1:{free_port()}"
    wrong_address = f"s3://tests/x?{server}&scheme=http&region=us-east-1"
    cases = {
        wrong_bucket: (
            "setting 'run.storage': s3://testz/x: there is no bucket 'testz'; "
            "create it, or correct the name"
        ),
        wrong_address: "s3://tests/x cannot be reached .* address right",
    }
    for url, message in cases.items():
        started = time.monotonic()
        with pytest.raises(UserError, match=message):
            EventStream.open(RemotePath(url) / "stream")
        assert time.monotonic() - started < 20, (
            "the first request's attempts have pauses of 0 to 3 s in all"
        )
    with (
        s3.refusing(),
        pytest.raises(
            UserError,
            match=r"'run.storage': .* cannot be reached .*ACCESS_DENIED.* "
            r"hold credentials for S3 \(AWS_ACC",
        ),
    ):
        EventStream.open(RemotePath(s3.url(tmp_path.name)) / "stream")


def test_an_outage_is_reported_as_one(s3: S3, tmp_path: Path) -> None:
    """Wrong: while the storage does not answer, a file counts as missing or damaged and is written
    again."""
    path = RemotePath(s3.url(tmp_path.name)) / "a.json"
    write_json(path, 1)
    with s3.refusing():
        for operation in (
            path.exists,
            path.stat,
            path.read_bytes,
            path.unlink,
            lambda: list(path.parent.glob("*")),
            lambda: write_json(path, 2),
        ):
            with pytest.raises(
                StorageError,
                match=r"s3://tests/.*; rerun the same command to resume when the storage can be",
            ):
                operation()
    assert read_json(path) == 1


def test_the_environment_names_the_server(
    s3: S3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: AWS_ENDPOINT_URL, which other tools follow, is ignored, and a run uses Amazon's
    servers."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3.address}/")
    monkeypatch.delenv("AWS_REGION", raising=False)
    open_filesystem.cache_clear()
    path = RemotePath(f"s3://tests/{tmp_path.name}/") / "a.json"
    write_json(path, 1)
    assert read_json(RemotePath(s3.url(tmp_path.name)) / "a.json") == 1
    open_filesystem.cache_clear()


def test_requests_are_few(s3: S3, tmp_path: Path) -> None:
    """Wrong: waiting for a window takes a request for each earlier window, or for each row."""
    root = RemotePath(s3.url(tmp_path.name)) / "stream"
    writer = StreamWriter(root, SCHEMA, {}, 100)
    for window in range(12):
        writer.write_window(window, window, window + 1, 0, [make_rows(100, window)])
    stream = EventStream.open(root)

    def requests(operation: Any) -> int:
        before = len(s3.requests())
        operation()
        return len(s3.requests()) - before

    assert stream.windows() == list(range(12)) and requests(stream.windows) == 1
    assert requests(lambda: stream.has(11)) == 1 and requests(lambda: stream.has(12)) <= 2
    fragment = stream.window(5).fragments[0]
    assert requests(lambda: stream.read(5, fragment)) <= 3, (
        "its size, its size once more by pyarrow, its bytes"
    )
