"""The pool of actors on Ray: bounds, the death of an actor, errors that come again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from example import make_stream
from publish import publish

from exfm_ray.das.pool import TRIES, Pool
from exfm_ray.das.scorer import Scored, Scorer, ScorerActor
from exfm_ray.das.supervision import SupervisionStore
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.runtime import user_error


@pytest.fixture
def parts(tmp_path: Path) -> tuple[EventStream, Any, SupervisionStore]:
    """A stream of 12 fragments a window (3 calls), snapshot 1, an empty store."""
    stream = make_stream(tmp_path / "stream", windows=2, rows=1200, fragment_rows=100)
    return stream, publish(tmp_path / "snapshots", 1), SupervisionStore(tmp_path / "supervision", "fm")


def make_pool(parts: tuple[EventStream, Any, SupervisionStore], smallest: int, largest: int, actor: Any = ScorerActor) -> Pool:
    stream, snapshots, store = parts
    return Pool(lambda: actor.remote(stream.root, snapshots, store, 1, 50, 1), smallest, largest)


@ray.remote
class Dying(Scorer):
    """Dies as a killed process does, after the first fragment of its first call in each of the folder's first `deaths` lives."""

    deaths = 1

    def score(self, window: int, fragments: Any, version: int) -> list[Scored]:
        import os

        lives = self.store.root.parent / "lives"
        lives.mkdir(exist_ok=True)
        born = len(list(lives.iterdir()))
        if born < self.deaths:
            (lives / str(born)).touch()
            super().score(window, fragments[:1], version)
            os._exit(1)
        return super().score(window, fragments, version)


def test_a_dead_actor_is_replaced_and_the_window_is_whole(cluster: None, parts: Any) -> None:
    """Wrong: an actor's death (preemption, lack of memory) loses a part of the window or ends the run."""
    stream, _, store = parts
    pool = make_pool(parts, 1, 1, Dying)
    first = pool.actors[0]
    rows = sum(scored.rows for scored in pool.score(stream.window(1), 1))
    assert pool.actors[0] is not first
    pool.stop()
    assert rows == 1100  # the dead actor's one fragment is on disk and is not scored again
    store.commit(stream.window(1), 1, ("click", "conversion"), 1)
    assert all(store.scored(1, fragment, 1) for fragment in stream.window(1).fragments)


def test_an_actor_killed_while_it_scores(cluster: None, parts: Any) -> None:
    """Wrong: ray.kill in the middle of a window leaves it incomplete."""
    stream, _, store = parts
    pool = make_pool(parts, 2, 2)
    results = pool.score(stream.window(1), 1)
    next(results)
    for actor in list(pool.actors):
        ray.kill(actor)
    list(results)
    pool.stop()
    assert all(store.scored(1, fragment, 1) for fragment in stream.window(1).fragments)


def test_a_call_that_kills_every_actor_ends_the_window(cluster: None, parts: Any) -> None:
    """Wrong: a fragment that kills its actor each time is tried for ever."""
    always = type("Always", (Dying.__ray_metadata__.modified_class,), {"deaths": 99})  # type: ignore[attr-defined]
    pool = make_pool(parts, 1, 1, ray.remote(always))
    with pytest.raises(ray.exceptions.RayActorError):
        list(pool.score(parts[0].window(1), 1))
    pool.stop()
    calls = 3  # in turn, each to the last try but one; then the first has used up its tries
    assert len(list((parts[2].root.parent / "lives").iterdir())) == calls * (TRIES - 1) + 1
    assert not parts[2].has(1)


def test_an_error_that_comes_again_is_not_retried(cluster: None, parts: Any) -> None:
    """Wrong: a damaged fragment is read again and again, or its window is committed."""
    stream, _, store = parts
    window = stream.window(1)
    path = stream.path(1, window.fragments[5])
    path.write_bytes(path.read_bytes()[:-3])
    pool = make_pool(parts, 1, 2)
    with pytest.raises(Exception, match="fragment=0005.parquet") as caught:
        list(pool.score(window, 1))
    pool.stop()
    assert isinstance(user_error(caught.value), UserError)
    with pytest.raises(UserError, match="not scored"):
        store.commit(window, 1, ("click",), 1)
    assert not store.has(1)


def test_grows_and_shrinks_within_its_bounds(cluster: None, parts: Any) -> None:
    """Wrong: the pool takes more actors than allowed, or fewer, or kills busy ones at every ebb."""
    pool = make_pool(parts, 1, 3)
    sizes = []
    for calls in (0, 2, 9, 0, 0, 0):
        pool.resize(calls)
        sizes.append(len(pool.actors))
    pool.stop()
    assert sizes == [1, 2, 3, 2, 1, 1]
    assert not pool.actors
