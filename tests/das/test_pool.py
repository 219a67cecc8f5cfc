"""Which actor gets which fragment, and how many actors there are. The actors are names here;
tests/das/test_service.py has real ones."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from exfm_ray.das import pool as pool_module
from exfm_ray.das.pool import ActorSlot, Pool
from exfm_ray.das.queue import ScoreTask
from exfm_ray.das.scorer import MAX_IN_FLIGHT
from exfm_ray.data.stream import Fragment


def call(*arguments: Any) -> object:
    """A reference."""
    return object()


def start() -> Any:
    return SimpleNamespace(ready=SimpleNamespace(remote=call), score=SimpleNamespace(remote=call))


def work(
    version: int,
    isolate: bool = False,
    number: int = 0,
) -> ScoreTask:
    return ScoreTask(
        version,
        Fragment(file=f"{number}.parquet", rows=1, bytes=1, domain_rows=(1,)),
        version,
        isolate=isolate,
    )


def make_pool(
    actors: int,
    rollover: int = 1,
    loaded: tuple[int, ...] = (),
) -> Pool:
    """A pool whose actors are up and hold some versions."""
    pool = Pool(start, actors, actors, rollover)
    pool.resize(0)
    for slot in pool.slots:
        slot.up = True
        slot.loaded = list(loaded)
    return pool


def in_hand(pool: Pool) -> list[list[int]]:
    """The versions of what each actor has in hand."""
    return [[work.version for work in slot.running.values()] for slot in pool.slots]


def test_spreads_work_and_keeps_no_more_than_calls_in_hand() -> None:
    """Wrong: one actor gets all fragments while another idles, or so many that the end of a window
    waits for one actor."""
    pool = make_pool(2)
    given = [pool.submit(work(1, number=number)) for number in range(2 * MAX_IN_FLIGHT + 1)]
    assert given == [True] * 2 * MAX_IN_FLIGHT + [False]
    assert in_hand(pool) == [[1] * MAX_IN_FLIGHT] * 2


@pytest.mark.parametrize("rollover", [1, 2])
def test_rolls_over_a_few_at_a_time(rollover: int) -> None:
    """Wrong: all actors load the next snapshot at once and none scores; or none may ever begin."""
    pool = make_pool(3, rollover, loaded=(1,))
    while pool.submit(work(2)):
        pass
    assert sum(bool(versions) for versions in in_hand(pool)) == rollover
    assert pool.submit(work(1)), "the others go on with the snapshot that they hold"
    for slot in pool.slots:  # the first ones have it now
        slot.loaded += [2] if 2 in slot.loading_versions else []
    assert pool.submit(work(2))
    assert sum(2 in versions for versions in in_hand(pool)) == min(rollover + 1, 3)


def test_fresh_actors_hold_up_nobody() -> None:
    """Wrong: at the start actors load their first snapshot one after the other."""
    pool = make_pool(3)
    for _ in range(3):
        assert pool.submit(work(1))
    assert in_hand(pool) == [[1], [1], [1]]


def test_a_suspect_gets_an_actor_by_itself() -> None:
    """Wrong: a fragment that kills its actor takes innocent ones with it again and again, until
    they are parked, too."""
    pool = make_pool(1, loaded=(1,))
    assert pool.submit(work(1)) and not pool.submit(work(1, isolate=True))
    pool.slots[0].running.clear()
    assert pool.submit(work(1, isolate=True)) and not pool.submit(work(1))


def test_an_actor_that_is_not_up_gets_nothing() -> None:
    """Wrong: on a cluster with too few CPUs, fragments wait for actors that cannot start while
    others are idle."""
    pool = make_pool(2)
    pool.slots[1].up = False
    assert [pool.submit(work(1)) for _ in range(MAX_IN_FLIGHT + 1)] == [True] * MAX_IN_FLIGHT + [
        False
    ]
    assert in_hand(pool)[1] == []


def test_grows_and_shrinks_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: the pool takes more actors than allowed, or fewer, kills busy ones, or shrinks at
    every ebb."""
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    pool = Pool(start, 1, 3, 1)
    sizes = []
    for fragments, patience in ((0, 99), (2, 99), (9, 99), (0, 99), (0, 0), (0, 0), (0, 0)):
        monkeypatch.setattr(pool_module, "SHRINK_S", patience)
        time.sleep(0.001)
        pool.resize(fragments)
        sizes.append(len(pool.slots))
    assert sizes == [1, 2, 3, 3, 2, 1, 1] and len(killed) == 2
    busy = pool.slots[0]
    pool.resize(3)
    for slot in pool.slots:
        slot.running[object()] = work(1)
    pool.resize(0)
    assert len(pool.slots) == 3 and pool.slots[0] is busy


def test_a_window_that_actors_have_in_hand() -> None:
    """Wrong: a window is taken for free of writers while an actor has a fragment of it."""
    pool = make_pool(1)
    assert not pool.has(1)
    pool.submit(work(1))
    assert pool.has(1) and not pool.has(2)


def test_an_actor_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: an actor that hangs holds its fragments, and so the service, for ever; or others lose
    theirs with it; or nobody says who it was."""
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    pool = make_pool(2)
    hung, well = pool.slots
    hung.process = 77
    late, beside, other = (work(1, number=number) for number in range(3))
    for slot, one in ((hung, late), (hung, beside), (well, other)):
        slot.running[object()] = one
    assert pool.collect([]) == []
    late.dispatched_s -= pool_module.CALL_TIMEOUT_S + 1
    came = pool.collect([])
    assert [(one.task, one.died, one.other_tasks) for one in came] == [
        (late, True, 1),
        (beside, True, 1),
    ]
    assert str(came[0].error) == "actor 1 (process 77) has not answered for 3601 s and was killed"
    assert (
        killed == [hung.actor]
        and well in pool.slots
        and hung not in pool.slots
        and len(pool.slots) == 2
    )


def test_what_an_actor_holds_and_takes_up() -> None:
    """Wrong: an actor that scores with one snapshot while it loads the next counts as idle, or as
    one that holds both."""
    slot = ActorSlot(start(), 1, loaded=[1])
    assert not slot.is_loading
    slot.running[object()] = work(2)
    assert slot.is_loading and slot.loading_versions == {2}
    assert not ActorSlot(start(), 2, running={object(): work(1)}).is_loading
