"""Rows and histories from a service that removes old snapshots: all windows, by the right
snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from example import SCHEMA
from local_service import Local, finish, local_services
from publish_snapshots import publish
from specs import make_place, make_spec
from uneven_streams import STREAMS, uneven_stream

from exfm_ray.config.distillation import HistoryConfig
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.das.student_data import StudentData
from exfm_ray.data.stream import EventStream
from exfm_ray.stores.shared_rows import SharedStore
from exfm_ray.stores.user_history import HistoryStore

pytestmark = pytest.mark.heavy


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[Local]:
    """Start services in this process, which end with the test."""
    with local_services(monkeypatch) as start:
        yield start


def spec_in(
    folder: Path,
    shared: bool = False,
    drift: str | None = None,
    **das: Any,
) -> LabelingSpec:
    """Return a spec with student data that removes snapshots no window needs."""
    spec = make_spec(folder, tries=1, **das)
    settings = HistoryConfig.model_validate({"dim": 3, "embedding_space": drift}) if drift else None
    history = HistoryStore(folder / "history", "fm", settings, spec.policy) if settings else None
    store = SharedStore(folder / "shared", "fm") if shared else None
    return replace(
        spec,
        owns_snapshots=True,
        student_data=StudentData(store, history, ("feed", "stories"), (), 0, spec.policy),
    )


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("drift", ["pinned", "refreshed", "aligned"])
def test_each_window_is_represented(
    local: Local,
    tmp_path: Path,
    every: int,
    drift: str,
) -> None:
    """Wrong: the snapshot from whose space the store is mapped is removed after its last window,
    and all later windows fail."""
    spec = spec_in(make_place(tmp_path, windows=7, rows=100), drift=drift, every=every)
    finish(local(spec), spec, range(7))
    history = spec.student_data.history if spec.student_data else None
    assert history and all(spec.has(window) for window in range(1, 7))
    asked = [spec.policy.version(window) for window in range(1, 7)]
    assert [history.manifest(window).snapshot for window in range(1, 7)] == asked
    assert [history.manifest(window).space for window in range(1, 7)] == (
        [1] * 6 if drift == "pinned" else asked
    )
    assert min(spec.snapshots.versions()) > (1 if every < 3 else 0), "and those that none needs go"


def test_an_empty_window_between(local: Local, tmp_path: Path) -> None:
    """Wrong: a store that had nothing to be mapped by is recorded in the next space, or the
    snapshot of the space that it is still in is removed."""
    uneven_stream(tmp_path / "stream", STREAMS["empty window"])
    for version in range(1, 5):
        publish(tmp_path / "snapshots", version)
    spec = spec_in(tmp_path, shared=True, drift="aligned")
    finish(local(spec), spec, range(5))
    student_data = spec.student_data
    assert student_data and student_data.history and student_data.shared
    assert [student_data.history.manifest(window).space for window in range(1, 5)] == [1, 1, 3, 4]
    assert (
        student_data.shared.read(2, "feed", SCHEMA, spec.policy)
        == {}
        != student_data.shared.read(3, "feed", SCHEMA, spec.policy)
    )
    assert spec.snapshots.versions() == [3, 4]


@pytest.mark.parametrize(
    "das", [{"fm_lag": 2}, {"fm_lag": 3}, {"every": 4}, {"every": 2, "fm_lag": 2}]
)
def test_what_is_served_with_shared_rows_can_be_stored(
    local: Local,
    tmp_path: Path,
    das: dict[str, int],
) -> None:
    """Wrong: a followed stream's last windows are scored before their labels come, and the snapshot
    is removed with which students that have learned as much as the FM are stored: they wait for it
    in vain."""
    learned = 4
    spec = spec_in(make_place(tmp_path, windows=8, rows=100, versions=learned), shared=True, **das)
    windows = [
        w
        for w in EventStream.open(spec.stream_root).windows()
        if (spec.policy.version(w) or 0) <= learned
    ]
    assert windows[-1] >= learned
    finish(local(spec), spec, windows)
    assert spec.policy.version(learned) in spec.snapshots.versions()
    for version in range(learned + 1, 8):
        publish(tmp_path / "snapshots", version)
    finish(local(spec), spec, range(8))
    assert (
        spec.policy.version(7) in spec.snapshots.versions() and 1 not in spec.snapshots.versions()
    )
