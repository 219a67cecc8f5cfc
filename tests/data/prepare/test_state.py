"""State that is carried from batch to batch: normalizer, history, duplicates; each against a plain
loop."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from exfm_ray.data.prepare.duplicates import DuplicateFinder
from exfm_ray.data.prepare.normalizer import Normalizer
from exfm_ray.data.prepare.sequence_feature import HistoryBuilder


def _pieces(count: int, cuts: list[int]) -> list[slice]:
    borders = sorted({0, count, *(c % (count + 1) for c in cuts)})
    return [slice(a, b) for a, b in itertools.pairwise(borders)]


EVENTS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 50), st.booleans()), max_size=60
)


@settings(max_examples=300, deadline=None)
@given(EVENTS, st.lists(st.integers(0, 60), max_size=5), st.integers(1, 4))
def test_history_is_strictly_before_the_event(
    events: list[tuple[int, int, int, bool]],
    cuts: list[int],
    length: int,
) -> None:
    """Otherwise a sequence holds the click that is to be predicted, or forgets or reorders earlier
    ones."""
    users, items = (np.array([e[i] for e in events], np.int64) for i in (0, 2))
    times = np.cumsum([e[1] for e in events], dtype=np.int64)
    acted = np.array([e[3] for e in events], bool)
    builder = HistoryBuilder(length)
    got = []
    for piece in _pieces(len(events), cuts):
        got += builder.extend(users[piece], times[piece], items[piece], acted[piece]).to_pylist()
    for i in range(len(events)):
        before = [
            int(items[j])
            for j in range(i)
            if acted[j] and users[j] == users[i] and times[j] < times[i]
        ]
        assert got[i] == before[-length:]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), max_size=50),
    st.lists(st.integers(0, 50), max_size=5),
)
def test_duplicates_are_found_across_batches(
    events: list[tuple[int, int]], cuts: list[int]
) -> None:
    """Otherwise a repetition hides behind a batch border, or an event of another time counts as
    one."""
    times = np.cumsum([e[0] for e in events], dtype=np.int64)
    hashes = np.array([e[1] for e in events], np.uint64)
    finder = DuplicateFinder()
    got = []
    for piece in _pieces(len(events), cuts):
        got += finder.repeated(times[piece], hashes[piece]).tolist()
    seen: dict[int, set[int]] = defaultdict(set)
    for time, value, repeated in zip(times.tolist(), hashes.tolist(), got, strict=True):
        assert repeated == (value in seen[time])
        seen[time].add(value)


def test_normalizer_knows_earlier_windows_only() -> None:
    """Otherwise a window's own future leaks into its features, or serving scales differently from
    training."""
    draw = np.random.default_rng(0)
    windows = [draw.normal(50 * w, 3 + w, (1000, 2)) for w in range(4)]
    for window in windows:
        window[draw.random(window.shape) < 0.1] = np.nan
    normalizer = Normalizer(["a", "b"])
    for index, window in enumerate(windows):
        earlier = np.concatenate(windows[:index]) if index else None
        shift = 0.0 if earlier is None else np.nanmean(earlier, axis=0)
        scale = 1.0 if earlier is None else np.nanstd(earlier, axis=0)
        expected = np.clip(np.nan_to_num((window - shift) / scale), -10, 10)
        for part in np.array_split(window, 3):
            normalizer.observe(part)
        assert np.allclose(normalizer.apply(window), expected, atol=1e-5)
        normalizer.close_window()
    state = normalizer.state()["a"]
    everything = np.concatenate(windows)[:, 0]
    assert np.allclose(
        [state["mean"], state["std"]], [np.nanmean(everything), np.nanstd(everything)]
    )


def test_a_constant_column_stays_finite() -> None:
    """Otherwise a column that never changes becomes infinite once it does."""
    normalizer = Normalizer(["a"])
    normalizer.observe(np.full((10, 1), 7.0))
    normalizer.close_window()
    assert normalizer.apply(np.array([[7.0], [8.0], [np.nan]])).ravel().tolist() == [0.0, 1.0, 0.0]
