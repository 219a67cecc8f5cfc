"""The synthetic stream and its truth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exfm_ray.config.data import SyntheticConfig
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.sources.synthetic import ClickLog, truth_path
from exfm_ray.data.sources.synthetic_world import SHIFT, World
from exfm_ray.data.stream import EventStream, list_values

MakeConfig = Callable[..., Config]
SMALL = {
    "windows": 4,
    "events_per_window": 60_000,
    "users": 5_000,
    "ads": 1_000,
    "advertisers": 100,
}


def files(root: Path, window: int) -> dict[str, bytes]:
    """Every byte of a window, its truth included."""
    folder = root / f"window={window:03d}"
    return {p.name: p.read_bytes() for p in folder.iterdir()} | {
        "truth": truth_path(root, window).read_bytes()
    }


def load(stream: EventStream) -> tuple[pa.Table, pa.Table]:
    """All events and their truth."""
    events = pa.concat_tables(
        stream.read(i, f) for i in stream.windows() for f in stream.window(i).fragments
    )
    truth = pa.concat_tables(
        pq.read_table(truth_path(stream.root, i), partitioning=None) for i in stream.windows()
    )
    return events, truth


def entropy(p: np.ndarray) -> np.ndarray:
    """The entropy of a coin with probability p."""
    return np.asarray(-(p * np.log(p) + (1 - p) * np.log(1 - p)))


def test_labels_follow_the_truth(make: MakeConfig) -> None:
    """Otherwise the best NE known is of another stream: in each of ten bins, labels within 5 sigma
    of the sum of the truth."""
    events, truth = load(prepare(make("synthetic", synthetic=SMALL)))
    assert events["example_id"].equals(truth["example_id"])
    labels = list_values(events["labels"], 2)
    for task in range(2):
        p = truth.column(task + 1).to_numpy().astype(np.float64)
        for chosen in np.array_split(np.argsort(p), 10):
            sigma = np.sqrt((p[chosen] * (1 - p[chosen])).sum())
            assert abs(labels[chosen, task].sum() - p[chosen].sum()) < 5 * sigma + 1
    assert not (labels[:, 1] > labels[:, 0]).any()


def test_the_stream_is_worth_learning(make: MakeConfig) -> None:
    """Otherwise there is nothing to learn (best NE near 1), nothing to distill, or domains do not
    differ."""
    events, truth = load(prepare(make("synthetic", synthetic=SMALL)))
    p = truth["click"].to_numpy().astype(np.float64)
    domain = events["domain"].to_numpy()
    assert 0.65 < entropy(p).mean() / entropy(p.mean()) < 0.8
    rates = [p[domain == d].mean() for d in range(4)]
    assert 0.005 < min(rates) < 0.02
    assert 0.17 < max(rates) < 0.3
    assert truth["conversion"].to_numpy().mean() < p.mean() / 5
    dense = list_values(events["dense"], 4)
    assert np.abs(dense.mean(axis=0)).max() < 1
    assert 0.5 < dense.std(axis=0).min() < dense.std(axis=0).max() < 1.5


def test_a_longer_stream_begins_with_the_shorter(make: MakeConfig) -> None:
    """Otherwise two runs of a seed with other numbers of windows cannot be compared."""
    short, long, other = (
        prepare(
            make(
                "synthetic",
                name=name,
                synthetic=SMALL | {"events_per_window": 5_000, "windows": windows, "seed": seed},
            )
        )
        for name, windows, seed in (("short", 2, 3), ("long", 4, 3), ("other", 2, 4))
    )
    assert all(files(short.root, w) == files(long.root, w) for w in range(2))
    assert files(short.root, 1) != files(other.root, 1)


def test_an_interrupted_stream_is_finished_the_same(make: MakeConfig) -> None:
    """Otherwise a killed run ends with other data than one that was not."""
    settings = SMALL | {"events_per_window": 5_000}
    whole = prepare(make("synthetic", name="whole", synthetic=settings))

    class KilledError(Exception):
        pass

    def kill(window: int, rows: int) -> None:
        if window == 1:
            raise KilledError

    config = make("synthetic", name="killed", synthetic=settings)
    with contextlib.suppress(KilledError):
        prepare(config, kill)
    root = config.folder / "stream"
    assert EventStream.open(root).windows() == [0, 1]
    before = (root / "window=001" / "manifest.json").stat().st_mtime_ns
    (root / "window=002").mkdir()
    (root / "window=002" / "fragment=0007.parquet").write_text("half")
    prepare(config)
    assert (root / "window=001" / "manifest.json").stat().st_mtime_ns == before
    assert all(files(whole.root, w) == files(root, w) for w in range(4))


def test_interests_turn_by_the_drift_and_users_leave() -> None:
    """Otherwise a stale teacher is as good as a fresh one."""
    world = World(SyntheticConfig(users=1000, ads=200, drift=0.15, churn=0.1, shift_at=2))
    for window, angle in ((1, 0.15), (2, 0.15 + SHIFT)):
        before = world.user_UK.copy()
        ids = world.user_id_U.copy()
        replaced = world.step()
        stayed = np.setdiff1d(np.arange(1000), replaced)
        assert world.window == window
        assert len(replaced) == 100
        cosine = (before * world.user_UK)[stayed].sum(axis=1) / 8
        assert np.allclose(np.arccos(cosine), angle, atol=1e-6)
        assert (world.user_id_U[stayed] == ids[stayed]).all()
        assert world.user_id_U[replaced].min() >= 1000


def test_clicked_ads_are_those_of_earlier_windows() -> None:
    """Otherwise the sequence holds clicks that have not happened yet, loses some, or passes them on
    to a new user."""
    draw = np.random.default_rng(0)
    log = ClickLog(20)
    clicks: list[list[int]] = [[] for _ in range(20)]
    for _ in range(30):
        shown = [list(c) for c in clicks]
        for _ in range(2):
            users = draw.integers(20, size=40)
            ads = draw.integers(1, 100, size=40).astype(np.int32)
            assert log.histories(np.arange(20)).to_pylist() == [c[-10:] for c in shown]
            log.add(users, ads)
            for user, ad in zip(users.tolist(), ads.tolist(), strict=True):
                clicks[user].append(ad)
        new = draw.integers(20, size=1)
        log.publish(new)
        clicks[int(new[0])] = []


def test_max_rows_stops_the_stream(make: MakeConfig) -> None:
    """Otherwise a short trial is a long one."""
    stream = prepare(
        make("synthetic", synthetic=SMALL | {"events_per_window": 1_000}, max_rows=1_500)
    )
    assert [stream.window(i).rows for i in stream.windows()] == [1_000, 500]
