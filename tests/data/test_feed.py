"""The feed on Ray: all rows, once, in the stream's order, on every worker; errors and waits that
reach the worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from example import make_rows, make_stream
from hypothesis import given
from hypothesis import strategies as st
from ray.util.placement_group import placement_group, remove_placement_group

from exfm_ray.data.feed import Feed, FeedClient, worker_slice
from exfm_ray.data.readers import FragmentReader, StreamReader, WindowPass
from exfm_ray.data.stream import EventStream, StreamWriter
from exfm_ray.errors import UserError
from exfm_ray.runtime.session import user_error
from exfm_ray.stores.readers import AugmentedReader
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.supervision import SupervisionStore

pytestmark = pytest.mark.heavy


@ray.remote(num_cpus=0)
class Consumer:
    """A worker that reads passes from the feed and keeps the ids."""

    def read(
        self,
        feed: Any,
        worker: int,
        reader: FragmentReader,
        passes: Sequence[WindowPass],
    ) -> list[list[np.ndarray[Any, Any]]]:
        client = FeedClient(feed, worker)
        found = []
        for work in passes:
            fragments = client.fragments(len(reader.fragments(work)))
            found.append([table["example_id"].to_numpy().copy() for table in fragments])
        return found


def consume(
    reader: FragmentReader,
    passes: Sequence[WindowPass],
    workers: int,
    wait_s: float = 20,
) -> list[list[list[np.ndarray[Any, Any]]]]:
    """The ids that each worker gets in each pass, fragment by fragment."""
    feed = Feed.options(max_concurrency=workers + 2).remote(reader, passes, workers, wait_s)  # type: ignore[attr-defined]
    consumers = [Consumer.remote() for _ in range(workers)]
    try:
        return ray.get(
            [c.read.remote(feed, i, reader, passes) for i, c in enumerate(consumers)], timeout=90
        )  # type: ignore[no-any-return]
    finally:
        for actor in (feed, *consumers):
            ray.kill(actor)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_worker_gets_all_fragments_in_order(
    cluster: None,
    stream: EventStream,
    workers: int,
) -> None:
    """Wrong: rows are lost, repeated or out of order, or the workers' streams differ."""
    passes = [
        WindowPass(window, purpose)
        for window in stream.windows()
        for purpose in ("evaluate", "learn")
    ]  # type: ignore[arg-type]
    for found in consume(StreamReader(stream.root), passes, workers):
        for work, fragments in zip(passes, found, strict=True):
            assert [len(ids) for ids in fragments] == [400, 400, 200]
            np.testing.assert_array_equal(
                np.concatenate(fragments), np.arange(work.window * 1000, (work.window + 1) * 1000)
            )


def test_empty_and_tiny_windows(cluster: None, tmp_path: Path) -> None:
    """Wrong: a window without events, or with fewer than there are workers, stops the feed or is
    skipped."""
    sizes = [0, 1, 0, 0, 3]
    writer = StreamWriter(
        tmp_path / "stream",
        make_stream(tmp_path / "other", windows=1, rows=1).schema,
        {},
        fragment_rows=2,
    )
    for window, rows in enumerate(sizes):
        writer.write_window(
            window,
            window,
            window + 1,
            0,
            [make_rows(rows, seed=window, first_id=window * 10)] if rows else [],
        )
    passes = [WindowPass(window, "learn") for window in range(len(sizes))]
    for found in consume(StreamReader(tmp_path / "stream"), passes, 2):
        assert [[ids.tolist() for ids in fragments] for fragments in found] == [
            [],
            [[10]],
            [],
            [],
            [[40, 41], [42]],
        ]


def test_missing_supervision_is_named(
    cluster: None,
    stream: EventStream,
    tmp_path: Path,
) -> None:
    """Wrong: a job waits forever, or does not say what it waits for."""
    reader = AugmentedReader(
        stream.root,
        SupervisionStore(tmp_path / "supervision", "fm"),
        SnapshotPolicy(1),
        (0,),
        ("click",),
    )
    with pytest.raises(
        UserError, match=r"the feed waited 1 s for the supervision of window 1 \(teacher 'fm'\)"
    ):
        consume(
            reader,
            [WindowPass(0, "learn"), WindowPass(1, "evaluate"), WindowPass(1, "learn")],
            1,
            wait_s=1,
        )


def test_an_error_in_a_read_reaches_the_worker(cluster: None, stream: EventStream) -> None:
    """Wrong: a damaged fragment hangs the workers, or the error is Ray's wrapper instead of the
    mistake."""
    path = stream.path(1, stream.window(1).fragments[1])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(Exception, match="fragment=0001.parquet") as caught:
        consume(StreamReader(stream.root), [WindowPass(0, "learn"), WindowPass(1, "learn")], 2)
    error = user_error(caught.value)
    assert isinstance(error, UserError) and str(error).startswith(
        f"{path}: 50 bytes where the manifest says"
    )


def test_begins_anew_for_other_workers(cluster: None, stream: EventStream) -> None:
    """Wrong: workers that are started again, in another number, get blocks of the reading before
    them, or wait for its workers."""
    passes = [WindowPass(window, "learn") for window in (0, 1)]
    feed = Feed.options(max_concurrency=6).remote(StreamReader(stream.root), passes, 2, 20)  # type: ignore[attr-defined]
    try:
        ray.get([feed.block.remote(worker, 0) for worker in range(2)], timeout=60)
        left = feed.block.remote(0, 5)  # worker 1 never takes its blocks, so this one is not read
        ray.get(feed.restart.remote(passes[1:], 1), timeout=60)
        (ref,) = ray.get(feed.block.remote(0, 0), timeout=60)
        assert ray.get(ref)["example_id"][0].as_py() == 1000
        with pytest.raises(RuntimeError, match="restarted for other workers"):
            ray.get(left, timeout=60)
        ray.get(feed.report_failure.remote("the learning rate is wrong"), timeout=60)
        with pytest.raises(UserError, match="the learning rate is wrong"):
            ray.get(feed.restart.remote(passes, 1), timeout=60)
        ray.get(feed.report_failure.remote("the other workers are gone"), timeout=60)
        assert ray.get(feed.failed.remote(), timeout=60) == "the learning rate is wrong"
    finally:
        ray.kill(feed)


def test_reads_on_without_a_cpu_after_a_loss(cluster: None, stream: EventStream) -> None:
    """Wrong: workers that hold every CPU that is left after a loss wait an hour and a half for a
    read task that asks for one more."""
    every_cpu = placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))
    feed = Feed.options(max_concurrency=4).remote(
        StreamReader(stream.root), [WindowPass(0, "learn")], 2, 20
    )  # type: ignore[attr-defined]
    try:
        assert every_cpu.wait(60), "another test holds a CPU"
        ray.get(feed.restart.remote([WindowPass(1, "learn")], 1), timeout=60)
        (ref,) = ray.get(feed.block.remote(0, 0), timeout=60)
        assert ray.get(ref)["example_id"][0].as_py() == 1000
    finally:
        ray.kill(feed)
        remove_placement_group(every_cpu)


@given(rows=st.integers(0, 50), workers=st.integers(1, 7))
def test_worker_slices_cover_a_batch(rows: int, workers: int) -> None:
    """Wrong: the workers' slices lose or repeat rows, or their lengths differ and a collective
    operation hangs."""
    batch = pa.table({"id": np.arange(rows)})
    shares = [worker_slice(batch, worker, workers) for worker in range(workers)]
    assert len({s.length for s in shares}) == 1 and all(
        s.table.num_rows <= s.length and s.total == rows for s in shares
    )
    assert [i for s in shares for i in s.table["id"].to_pylist()] == list(range(rows))
