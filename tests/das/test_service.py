"""The service on Ray: the same bytes as one process writes, whoever asks and whatever dies; faults
named and parked."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from specs import make_order, make_place, scored, undisturbed, written

from exfm_ray.das import client
from exfm_ray.das.client import connect, end, label, services
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import read_jsonl, write_json

pytestmark = pytest.mark.heavy

WAIT_S = 60


def run(
    order: LabelingSpec,
    windows: list[int] | None = None,
    watch: Callable[[], None] = lambda: None,
) -> dict[int, int]:
    """Have windows labelled; the rows that were told as progress."""
    rows: dict[int, int] = {}

    def progress(window: int, more: int) -> None:
        rows[window] = rows.get(window, 0) + more

    label(order, windows or EventStream.open(order.stream_root).windows(), progress, watch)
    return rows


@pytest.fixture
def serving(cluster: None) -> Iterator[Callable[..., Any]]:
    """Starts lasting services, which are ended after the test."""
    started = []

    def start(order: LabelingSpec, follow: bool = False) -> Any:
        started.append(connect(order, detached=True, follow=follow))
        return started[-1]

    yield start
    for service in started:
        end(service)


def test_writes_what_one_process_writes(cluster: None, tmp_path: Path) -> None:
    """Wrong: the service's supervision differs from a lone scorer's in a byte, rows are told twice,
    or a service stays when it is done."""
    order = make_order(make_place(tmp_path, windows=4), max_actors=2)
    assert run(order) == {1: 1000, 2: 1000, 3: 1000}
    assert written(order) == undisturbed(order)
    lines = sorted(read_jsonl(order.log), key=lambda line: line["window"])
    assert [(line["window"], line["snapshot"], line["examples"]) for line in lines] == [
        (w, w, 1000) for w in (1, 2, 3)
    ]
    assert all(
        line["started_s"] + line["waited_s"] <= line["ended_s"]
        and line["snapshot_s"] <= line["ended_s"]
        for line in lines
    )
    assert order.name not in services()
    assert run(order) == {}


def test_two_clients_share_the_work(
    cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: two pipelines that ask for the same window each score it, or one of them ends the
    other's service; or clients that find it slow to start, as this one is for their patience, end
    it and begin again, for ever on a busy machine."""
    order = make_order(make_place(tmp_path, windows=3, rows=2000, fragment_rows=100))
    monkeypatch.setattr(client, "RPC_TIMEOUT_S", 0.5)
    with ThreadPoolExecutor(2) as clients:
        one, two = clients.map(run, [order, order])
    assert written(order) == undisturbed(order)
    lines = sorted(read_jsonl(order.log), key=lambda line: line["window"])
    assert [line["window"] for line in lines] == [1, 2]
    assert sum(one.values()) == 4000 or sum(two.values()) == 4000


def test_other_settings_are_refused(serving: Any, tmp_path: Path) -> None:
    """Wrong: a client gets supervision that was made by other settings than its own."""
    serving(make_order(make_place(tmp_path)))
    with pytest.raises(UserError, match=r"a DAS with other settings is at work on .*das: "):
        run(make_order(tmp_path, fm_lag=2))


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def test_killed_actors_and_services(serving: Any, tmp_path: Path) -> None:
    """Wrong: the death of an actor or of the service loses a fragment, writes another byte, or ends
    the wait (rule 5)."""
    order = make_order(
        make_place(tmp_path, windows=4, rows=2000, fragment_rows=50),
        min_actors=2,
        max_actors=2,
        tries=20,
    )
    kills: list[str] = []

    def watch() -> None:
        """Kill an actor, then the service, then an actor ... as soon as it has written something
        since the last time."""
        if len(kills) >= 5 or len(scored(order)) < 10 * len(kills) + 3:
            return
        with suppress(RayActorError):  # the service that was killed last is not back yet
            service = connect(order)
            ups = [
                actor["process"]
                for actor in ray.get(service.state.remote())["actors"]
                if actor["up"]
            ]
            if ups and len(kills) % 2 == 0:
                kill(ups[0])
            elif ups:
                ray.kill(service, no_restart=len(kills) == 1)
            kills.extend(["one"] if ups else [])

    run(order, watch=watch)
    assert len(kills) == 5
    assert written(order) == undisturbed(order)
    assert not (order.store.root / "fm" / "parked.json").exists()
    assert sorted(line["window"] for line in read_jsonl(order.log)) == [1, 2, 3]


def test_the_client_tells_of_a_service_that_has_failed(
    cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a fault of the service itself leaves its clients waiting for ever."""
    order = make_order(make_place(tmp_path))
    (order.store.root / "fm").mkdir(parents=True)
    write_json(order.store.root / "fm" / "parked.json", [{"window": "one"}])
    monkeypatch.setattr(client, "RPC_TIMEOUT_S", 20.0)
    with pytest.raises(Exception, match=r"parked.json"):
        run(order)
