"""Rows and histories given by a service whose old snapshots go: every window is made, of the
snapshots that the settings say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from example import SCHEMA
from local_service import Local, finish, local_services
from publish_snapshots import publish
from specs import make_order, make_place
from uneven_streams import STREAMS, uneven_stream

from exfm_ray.config.distillation import HistoryConfig
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.das.student_data import StudentData
from exfm_ray.data.stream import EventStream
from exfm_ray.stores.shared_rows import SharedStore
from exfm_ray.stores.user_history import HistoryStore


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[Local]:
    """Starts services in this process, which end with the test."""
    with local_services(monkeypatch) as start:
        yield start


def order_in(
    folder: Path,
    shared: bool = False,
    drift: str | None = None,
    **das: Any,
) -> LabelingSpec:
    """With gifts, and snapshots that go when no window needs them."""
    order = make_order(folder, tries=1, **das)
    settings = HistoryConfig.model_validate({"dim": 3, "embedding_space": drift}) if drift else None
    history = HistoryStore(folder / "history", "fm", settings, order.policy) if settings else None
    store = SharedStore(folder / "shared", "fm") if shared else None
    return replace(
        order,
        owns_snapshots=True,
        student_data=StudentData(store, history, ("feed", "stories"), (), 0, order.policy),
    )


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("drift", ["pinned", "refreshed", "aligned"])
def test_each_window_is_represented(
    local: Local,
    tmp_path: Path,
    every: int,
    drift: str,
) -> None:
    """Wrong: the snapshot out of whose space the store is mapped goes when its last window is
    scored, and all later windows are parked."""
    order = order_in(make_place(tmp_path, windows=7, rows=100), drift=drift, every=every)
    finish(local(order), order, range(7))
    history = order.student_data.history if order.student_data else None
    assert history and all(order.has(window) for window in range(1, 7))
    asked = [order.policy.version(window) for window in range(1, 7)]
    assert [history.manifest(window).snapshot for window in range(1, 7)] == asked
    assert [history.manifest(window).space for window in range(1, 7)] == (
        [1] * 6 if drift == "pinned" else asked
    )
    assert min(order.snapshots.versions()) > (1 if every < 3 else 0), "and those that none needs go"


def test_an_empty_window_between(local: Local, tmp_path: Path) -> None:
    """Wrong: a store that had nothing to be mapped by is said to be in the next space, or the
    snapshot of the space where it still is goes."""
    uneven_stream(tmp_path / "stream", STREAMS["empty window"])
    for version in range(1, 5):
        publish(tmp_path / "snapshots", version)
    order = order_in(tmp_path, shared=True, drift="aligned")
    finish(local(order), order, range(5))
    gifts = order.student_data
    assert gifts and gifts.history and gifts.shared
    assert [gifts.history.manifest(window).space for window in range(1, 5)] == [1, 1, 3, 4]
    assert (
        gifts.shared.read(2, "feed", SCHEMA, order.policy)
        == {}
        != gifts.shared.read(3, "feed", SCHEMA, order.policy)
    )
    assert order.snapshots.versions() == [3, 4]


@pytest.mark.parametrize(
    "das", [{"fm_lag": 2}, {"fm_lag": 3}, {"every": 4}, {"every": 2, "fm_lag": 2}]
)
def test_what_is_served_with_shared_rows_can_be_stored(
    local: Local,
    tmp_path: Path,
    das: dict[str, int],
) -> None:
    """Wrong: a followed stream's last windows are scored before their labels come, and the snapshot
    goes with which students that have learnt all that the FM has are stored: they wait for it in
    vain."""
    learnt = 4
    order = order_in(make_place(tmp_path, windows=8, rows=100, versions=learnt), shared=True, **das)
    windows = [
        w
        for w in EventStream.open(order.stream_root).windows()
        if (order.policy.version(w) or 0) <= learnt
    ]
    assert windows[-1] >= learnt
    finish(local(order), order, windows)
    assert order.policy.version(learnt) in order.snapshots.versions()
    for version in range(learnt + 1, 8):
        publish(tmp_path / "snapshots", version)
    finish(local(order), order, range(8))
    assert (
        order.policy.version(7) in order.snapshots.versions()
        and 1 not in order.snapshots.versions()
    )
