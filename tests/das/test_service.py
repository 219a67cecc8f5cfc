"""The service on Ray: the bytes of a single process, whatever dies; failures are named and
listed."""

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
from specs import make_place, make_spec, scored, undisturbed, written

from exfm_ray.das import client
from exfm_ray.das.client import connect, end, label, services
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import read_jsonl, write_json

pytestmark = pytest.mark.heavy

WAIT_S = 60


def run(
    spec: LabelingSpec,
    windows: list[int] | None = None,
    watch: Callable[[], None] = lambda: None,
) -> dict[int, int]:
    """Have windows labeled and return the rows that were reported as progress."""
    rows: dict[int, int] = {}

    def progress(window: int, more: int) -> None:
        rows[window] = rows.get(window, 0) + more

    label(spec, windows or EventStream.open(spec.stream_root).windows(), progress, watch)
    return rows


@pytest.fixture
def serving(cluster: None) -> Iterator[Callable[..., Any]]:
    """Start detached services, which are ended after the test."""
    started = []

    def start(spec: LabelingSpec, follow: bool = False) -> Any:
        started.append(connect(spec, detached=True, follow=follow))
        return started[-1]

    yield start
    for service in started:
        end(service)


def test_writes_what_one_process_writes(cluster: None, tmp_path: Path) -> None:
    """Wrong: the service's supervision differs from a single scorer's in a byte, rows are reported
    twice, or a service stays when it is done."""
    spec = make_spec(make_place(tmp_path, windows=4), max_actors=2)
    assert run(spec) == {1: 1000, 2: 1000, 3: 1000}
    assert written(spec) == undisturbed(spec)
    lines = sorted(read_jsonl(spec.log), key=lambda line: line["window"])
    assert [(line["window"], line["snapshot"], line["examples"]) for line in lines] == [
        (w, w, 1000) for w in (1, 2, 3)
    ]
    assert all(
        line["started_s"] + line["waited_s"] <= line["ended_s"]
        and line["snapshot_s"] <= line["ended_s"]
        for line in lines
    )
    assert spec.name not in services()
    assert run(spec) == {}


def test_two_clients_share_the_work(
    cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: two pipelines that request the same window each score it, or one of them ends the
    other's service; or clients that find it slow to start, as this one is for their timeout, end it
    and start again, forever on a busy machine."""
    spec = make_spec(make_place(tmp_path, windows=3, rows=2000, fragment_rows=100))
    monkeypatch.setattr(client, "RPC_TIMEOUT_S", 0.5)
    with ThreadPoolExecutor(2) as clients:
        one, two = clients.map(run, [spec, spec])
    assert written(spec) == undisturbed(spec)
    lines = sorted(read_jsonl(spec.log), key=lambda line: line["window"])
    assert [line["window"] for line in lines] == [1, 2]
    assert sum(one.values()) == 4000 or sum(two.values()) == 4000


def test_other_settings_are_refused(serving: Any, tmp_path: Path) -> None:
    """Wrong: a client gets supervision that was made with other settings than its own."""
    serving(make_spec(make_place(tmp_path)))
    with pytest.raises(UserError, match=r"a DAS with other settings is at work on .*das: "):
        run(make_spec(tmp_path, fm_lag=2))


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def test_killed_actors_and_services(serving: Any, tmp_path: Path) -> None:
    """Wrong: the death of an actor or of the service loses a fragment, changes a byte, or ends the
    wait (rule 5)."""
    spec = make_spec(
        make_place(tmp_path, windows=4, rows=2000, fragment_rows=50),
        min_actors=2,
        max_actors=2,
        tries=20,
    )
    kills: list[str] = []

    def watch() -> None:
        """Kill an actor, then the service, then an actor ... after each has written something
        new."""
        if len(kills) >= 5 or len(scored(spec)) < 10 * len(kills) + 3:
            return
        with suppress(RayActorError):  # the service that was killed last is not back yet
            service = connect(spec)
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

    run(spec, watch=watch)
    assert len(kills) == 5
    assert written(spec) == undisturbed(spec)
    assert not (spec.store.root / "fm" / "parked.json").exists()
    assert sorted(line["window"] for line in read_jsonl(spec.log)) == [1, 2, 3]


def test_the_client_gets_the_error_of_a_failed_service(
    cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: an error of the service itself leaves its clients waiting forever."""
    spec = make_spec(make_place(tmp_path))
    (spec.store.root / "fm").mkdir(parents=True)
    write_json(spec.store.root / "fm" / "parked.json", [{"window": "one"}])
    monkeypatch.setattr(client, "RPC_TIMEOUT_S", 20.0)
    with pytest.raises(Exception, match=r"parked.json"):
        run(spec)
