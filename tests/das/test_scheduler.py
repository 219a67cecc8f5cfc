"""A failure of one window stays with that window, and a temporary failure is retried. Without
Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from local_service import CLIENT, Local, LocalPool, finish, local_services, until
from safetensors import SafetensorError
from specs import make_place, make_spec, undisturbed, written

from exfm_ray.das.scheduler import Scheduler
from exfm_ray.das.scorer import Scorer
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import read_json
from exfm_ray.storage.remote import StorageError
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.stores.supervision import SupervisionStore

pytestmark = pytest.mark.heavy

FULL = SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[Local]:
    """Start services in this process, which end with the test."""
    with local_services(monkeypatch) as start:
        yield start


@dataclass
class Histories:
    """Student data without content, made in order.

    `fails`: windows for which it cannot be made.
    """

    fails: tuple[int, ...] = ()
    made: list[int] = field(default_factory=list)

    def has(self, window: int) -> bool:
        return window in self.made

    def ready(self, window: int) -> bool:
        return window <= 1 or self.has(window - 1)

    def publish(
        self,
        stream: EventStream,
        snapshots: SnapshotStore,
        window: Any,
        version: int,
    ) -> None:
        if window.index in self.fails:
            raise FULL
        if not self.ready(window.index):
            raise UserError(f"window {window.index - 1} is not represented")
        self.made.append(window.index)


def causes(spec: Any) -> dict[int, str]:
    return {row["window"]: row["cause"] for row in read_json(spec.failed_list)}


@pytest.mark.parametrize("where", ["commit", "student data"])
def test_a_failure_of_one_window_fails_that_window(
    local: Local,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    """Wrong: a full disk, which safetensors reports as an error of its own type, ends the whole
    service, or is not named."""
    spec = make_spec(make_place(tmp_path, windows=4), tries=2)
    commit = SupervisionStore.commit

    def fails(self: SupervisionStore, window: Any, *arguments: Any) -> None:
        if window.index == 2:
            raise FULL
        commit(self, window, *arguments)

    if where == "commit":
        monkeypatch.setattr(SupervisionStore, "commit", fails)
    student_data: Any = Histories(fails=(3,)) if where == "student data" else None
    bad = 3 if student_data else 2
    service = local(spec := replace(spec, student_data=student_data))
    with pytest.raises(
        UserError,
        match="SafetensorError: I/O error: No space left on device .* "
        rf"no supervision of window\(s\) {bad} by",
    ):
        finish(service, spec, range(4))
    assert not service.state()["error"]
    assert [spec.store.has(w) for w in (1, 2, 3)] == [w != bad for w in (1, 2, 3)]
    (listed,) = read_json(spec.failed_list)
    assert (listed["window"], listed["fragment"], listed["tries"]) == (bad, None, 2)


OUTAGES: list[tuple[type, str, type[Exception]]] = [
    (SnapshotStore, "versions", StorageError),
    (EventStream, "window", StorageError),
    (SupervisionStore, "commit", StorageError),
    (SupervisionStore, "commit", OSError),
    (SupervisionStore, "has", OSError),
    (EventStream, "has", OSError),
]


@pytest.mark.parametrize(
    ("kind", "name", "error"),
    OUTAGES,
    ids=[f"{kind.__name__}.{name}: {error.__name__}" for kind, name, error in OUTAGES],
)
def test_an_outage_fails_no_window(
    local: Local,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    name: str,
    error: type[Exception],
) -> None:
    """Wrong: a short outage of the storage, when a window is opened or committed, fails the window
    or ends the service."""
    spec = make_spec(make_place(tmp_path), tries=3)
    whole = getattr(kind, name)
    left = [error("no answer")] * 2
    service = local(spec)

    def fails(*arguments: Any, **options: Any) -> Any:
        if left and threading.current_thread().name == "das":
            raise left.pop()
        return whole(*arguments, **options)

    monkeypatch.setattr(kind, name, fails)
    finish(service, spec, range(3))
    assert not left and not spec.failed_list.exists()
    assert any("no answer" in message for _, message in service.state()["faults"])
    assert written(spec) == undisturbed(spec)


def test_what_a_late_actor_has_written_is_scored_again(
    local: Local,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a late actor overwrites a fragment with another snapshot's predictions, and the window
    is committed anyway."""
    spec = make_spec(make_place(tmp_path))
    collect = LocalPool.collect
    late = Scorer(make_spec(tmp_path))
    fragment = EventStream.open(spec.stream_root).window(2).fragments[1]
    writes = [1]

    def collects(self: LocalPool, ready: Any) -> Any:
        completions = collect(self, ready)
        if writes and any(one.task.window == 2 for one in completions):
            late.score(2, fragment, writes.pop())
        return completions

    monkeypatch.setattr(LocalPool, "collect", collects)
    service = local(spec)
    assert finish(service, spec, range(3)) == {1: 1000, 2: 1000 + fragment.rows}
    assert any(
        "fragment=0001.parquet: not scored by snapshot 2" in message
        for _, message in service.state()["faults"]
    )
    assert written(spec) == undisturbed(spec) and not writes


def test_a_window_waits_for_actors_that_may_still_write(
    local: Local,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a window is committed while an actor still has one of its fragments, of a version that
    was left out since."""
    spec = make_spec(make_place(tmp_path, windows=2))
    free = threading.Event()
    monkeypatch.setattr(LocalPool, "has", lambda self, window: not free.is_set())
    service = local(spec, detached=True)
    until(lambda: service._scheduler._queue.finished())
    time.sleep(0.2)
    assert not spec.store.has(1)
    free.set()
    until(lambda: spec.store.has(1))


def histories(folder: Path, **das: Any) -> tuple[Any, Histories]:
    """Return a spec with histories over four windows of one fragment each, and the student data."""
    student_data: Any = Histories()
    return replace(
        make_spec(make_place(folder, windows=4, fragment_rows=1000), **das),
        student_data=student_data,
    ), student_data


def test_histories_wait_for_a_window_that_is_opened_again(local: Local, tmp_path: Path) -> None:
    """Wrong: while a window waits for a fallback of its damaged snapshot, the intact window after
    it fails."""
    spec, made = histories(tmp_path, tries=1)
    dense = spec.snapshots.folder(2) / "dense.safetensors"
    dense.write_bytes(dense.read_bytes()[:-3])
    finish(local(spec), spec, range(4))
    assert made.made == [1, 2, 3] and not spec.failed_list.exists()
    assert [spec.store.manifest(window).snapshot for window in (1, 2, 3)] == [1, 1, 3]


def test_histories_after_a_failed_window_say_so(local: Local, tmp_path: Path) -> None:
    """Wrong: a window whose predecessor has failed waits forever, or fails for a cause that does
    not name that one."""
    spec, made = histories(tmp_path, tries=1)
    stream = EventStream.open(spec.stream_root)
    path = stream.path(2, stream.window(2).fragments[0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=r"no supervision of window\(s\) 2, 3 by"):
        finish(local(spec), spec, range(4))
    assert (
        causes(spec)[3] == "window 3 is given each user's history up to window 2, which has failed"
    )
    path.write_bytes(whole)
    finish(local(spec), spec, range(4))
    assert made.made == [1, 2, 3]


def test_histories_that_no_client_requested_are_not_waited_for(
    local: Local, tmp_path: Path
) -> None:
    """Wrong: a client that requests one window waits forever for the window before, which no client
    requests."""
    spec, _ = histories(tmp_path, tries=1)
    with pytest.raises(
        UserError, match=r"window 2 is not represented; no supervision of window\(s\) 3"
    ):
        finish(local(spec), spec, [3])


def test_a_committed_window_has_not_failed(local: Local, tmp_path: Path) -> None:
    """Wrong: a log that cannot be written fails a window whose supervision is committed, or goes
    unreported."""
    (tmp_path / "full").touch()  # no folder can be made here, as root may write to a read-only one
    spec = replace(make_spec(make_place(tmp_path)), log=tmp_path / "full" / "timeline.jsonl")
    service = local(spec)
    finish(service, spec, range(3))
    message = service.progress(CLIENT)
    assert message and message["failed"] == {} and not spec.failed_list.exists()
    faults = [fault.partition(" failed: ")[0] for _, fault in service.state()["faults"]]
    assert faults == [f"window {w} is committed, but what follows" for w in (1, 2)]


def test_clients_get_the_error_of_a_service_that_has_failed(
    local: Local,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: `das start` says that windows are labeled while the thread that should do it is
    dead."""
    spec = make_spec(make_place(tmp_path))

    def fails(self: Scheduler) -> None:
        raise RuntimeError("no actor starts")

    monkeypatch.setattr(Scheduler, "dispatch", fails)
    service = local(spec, detached=True)
    until(lambda: service.state()["error"])
    calls: list[Callable[[], Any]] = [
        lambda: service.ask(CLIENT, [1]),
        lambda: service.follow(False),
        lambda: service.progress(CLIENT),
    ]
    for call in calls:
        with pytest.raises(
            RuntimeError,
            match=r"(?s)the DAS has failed; end it with `run.py das stop` and start it again.*"
            "no actor starts",
        ):
            call()
    assert service.leave(CLIENT) is False


def test_speed_in_the_first_half_minute(local: Local, tmp_path: Path) -> None:
    """Wrong: four seconds after its start a service divides by thirty."""
    spec = make_spec(make_place(tmp_path))
    service = local(spec)
    finish(service, spec, range(3))
    service._scheduler._started_s = time.monotonic() - 4
    assert 2000 / 10 < service.state()["examples_per_s"] <= 2000 / 4, (
        "of 2,000 examples; the test may be slow"
    )


def test_follows_after_a_restart(
    local: Local,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a service that was asked to follow after its start no longer does so when Ray has
    restarted it; or a new service follows without being asked."""
    spec = make_spec(make_place(tmp_path))
    monkeypatch.setattr("exfm_ray.das.service._actor_id", lambda: "one")
    first = local(spec, detached=True)
    first.follow(False)
    assert not local(spec, detached=True).state()["follow"]
    first.follow(True)
    first.follow(False)
    assert first.state()["follow"] and local(spec, detached=True).state()["follow"]
    monkeypatch.setattr("exfm_ray.das.service._actor_id", lambda: "another, after `das stop`")
    assert not local(spec, detached=True).state()["follow"]


def test_clients_that_were_killed_are_forgotten(
    local: Local,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a pipeline that was killed counts as a client forever, or one that is running is
    forgotten."""
    monkeypatch.setattr("exfm_ray.das.service.CLIENT_TIMEOUT_S", 1.0)
    service = local(make_spec(make_place(tmp_path, versions=0)), detached=True)
    service.ask("killed", [1])
    service.ask("at work", [1])
    assert service.state()["clients"] == 2
    until(lambda: service.progress("at work") is not None and service.state()["clients"] == 1)
    assert service.progress("killed") is None and service.progress("own")
