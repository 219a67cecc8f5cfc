"""Which actor gets which fragment, and how many actors there are.

The actors are stand-ins here; tests/das/test_service.py has real ones.
"""

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
    """Return a stand-in for a Ray reference."""
    return object()


def start() -> Any:
    return SimpleNamespace(ready=SimpleNamespace(remote=call), score=SimpleNamespace(remote=call))


def make_task(
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
    max_reloads: int = 1,
    loaded: tuple[int, ...] = (),
) -> Pool:
    """Return a pool whose actors are up and hold some versions."""
    pool = Pool(start, actors, actors, max_reloads)
    pool.resize(0)
    for slot in pool.slots:
        slot.up = True
        slot.loaded = list(loaded)
    return pool


def versions_in_progress(pool: Pool) -> list[list[int]]:
    """Return the versions of the tasks that each actor has."""
    return [[task.version for task in slot.running.values()] for slot in pool.slots]


def test_spreads_tasks_up_to_the_limit_of_each_actor() -> None:
    """Wrong: one actor gets all fragments while another idles, or so many that the end of a window
    waits for one actor."""
    pool = make_pool(2)
    submitted = [
        pool.submit(make_task(1, number=number)) for number in range(2 * MAX_IN_FLIGHT + 1)
    ]
    assert submitted == [True] * 2 * MAX_IN_FLIGHT + [False]
    assert versions_in_progress(pool) == [[1] * MAX_IN_FLIGHT] * 2


@pytest.mark.parametrize("max_reloads", [1, 2])
def test_loads_the_next_snapshot_on_a_few_actors_at_a_time(max_reloads: int) -> None:
    """Wrong: all actors load the next snapshot at once and none scores, or none may ever begin."""
    pool = make_pool(3, max_reloads, loaded=(1,))
    while pool.submit(make_task(2)):
        pass
    assert sum(bool(versions) for versions in versions_in_progress(pool)) == max_reloads
    assert pool.submit(make_task(1)), "the others continue with the snapshot that they hold"
    for slot in pool.slots:  # the first ones have it now
        slot.loaded += [2] if 2 in slot.loading_versions else []
    assert pool.submit(make_task(2))
    assert sum(2 in versions for versions in versions_in_progress(pool)) == min(max_reloads + 1, 3)


def test_new_actors_load_at_once() -> None:
    """Wrong: at the start actors load their first snapshot one after the other."""
    pool = make_pool(3)
    for _ in range(3):
        assert pool.submit(make_task(1))
    assert versions_in_progress(pool) == [[1], [1], [1]]


def test_a_suspect_gets_an_actor_by_itself() -> None:
    """Wrong: a fragment that kills its actor fails innocent ones again and again, until they have
    failed for good, too."""
    pool = make_pool(1, loaded=(1,))
    assert pool.submit(make_task(1)) and not pool.submit(make_task(1, isolate=True))
    pool.slots[0].running.clear()
    assert pool.submit(make_task(1, isolate=True)) and not pool.submit(make_task(1))


def test_an_actor_that_is_not_up_gets_nothing() -> None:
    """Wrong: on a cluster with too few CPUs, fragments wait for actors that cannot start while
    others are idle."""
    pool = make_pool(2)
    pool.slots[1].up = False
    assert [pool.submit(make_task(1)) for _ in range(MAX_IN_FLIGHT + 1)] == [
        True
    ] * MAX_IN_FLIGHT + [False]
    assert versions_in_progress(pool)[1] == []


def test_grows_and_shrinks_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: the pool has more actors than allowed, or fewer, kills busy ones, or shrinks at every
    short pause."""
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
        slot.running[object()] = make_task(1)
    pool.resize(0)
    assert len(pool.slots) == 3 and pool.slots[0] is busy


def test_a_window_that_actors_work_on() -> None:
    """Wrong: a window counts as free of writers while an actor has a fragment of it."""
    pool = make_pool(1)
    assert not pool.has(1)
    pool.submit(make_task(1))
    assert pool.has(1) and not pool.has(2)


def test_an_actor_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: an actor that hangs blocks its fragments, and so the service, forever; or other actors
    lose theirs; or the error does not name the actor."""
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    pool = make_pool(2)
    hung, well = pool.slots
    hung.process = 77
    late, beside, other = (make_task(1, number=number) for number in range(3))
    for slot, task in ((hung, late), (hung, beside), (well, other)):
        slot.running[object()] = task
    assert pool.collect([]) == []
    late.dispatched_s -= pool_module.CALL_TIMEOUT_S + 1
    completions = pool.collect([])
    assert [(end.task, end.died, end.other_tasks) for end in completions] == [
        (late, True, 1),
        (beside, True, 1),
    ]
    assert (
        str(completions[0].error)
        == "actor 1 (process 77) has not answered for 3601 s and was killed"
    )
    assert (
        killed == [hung.actor]
        and well in pool.slots
        and hung not in pool.slots
        and len(pool.slots) == 2
    )


def test_what_an_actor_has_loaded_and_is_loading() -> None:
    """Wrong: an actor that scores with one snapshot while it loads the next counts as idle, or as
    one that holds both."""
    slot = ActorSlot(start(), 1, loaded=[1])
    assert not slot.is_loading
    slot.running[object()] = make_task(2)
    assert slot.is_loading and slot.loading_versions == {2}
    assert not ActorSlot(start(), 2, running={object(): make_task(1)}).is_loading
