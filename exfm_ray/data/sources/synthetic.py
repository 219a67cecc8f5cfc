"""The synthetic stream: generated ad events whose true click and conversion probabilities are
known.

The true probabilities are written to `<stream>/truth/window=000.parquet` (example_id, and one
float32 column per task), beside the events and not among them: metrics read them, models never do.

Shapes: N events of a chunk, U users, A ads, L clicked ads of a user.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exfm_ray.config.data import SyntheticConfig
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.packer import packed
from exfm_ray.data.prepare.sequence_feature import gather
from exfm_ray.data.prepare.window_cutter import Progress
from exfm_ray.data.sources import synthetic_world as latent
from exfm_ray.data.sources.base import indexed, sequence
from exfm_ray.data.sources.synthetic_world import World
from exfm_ray.data.stream import StreamWriter, WindowWriter, window_name
from exfm_ray.schema import DenseFeature, Encoding, Kind, Schema, SparseFeature
from exfm_ray.storage.atomic import atomic_path
from exfm_ray.storage.remote import AnyPath

Array = np.ndarray[Any, Any]

TASKS = ("click", "conversion")
START_MS = 1_704_067_200_000  # 2024-01-01T00:00Z
WINDOW_MS = 3_600_000
CHUNK_ROWS = 50_000
CLICKS = 10
DENSE = ("user_activity", "ad_quality", "user_taste", "ad_style")
DENSE_NOISE = 1.0
CLICK_DELAY_S = 120.0
CONVERSION_DELAY_S = 43_200.0
"""Mean delays. A conversion becomes known that much after its click."""
ORACLE = pa.schema([("example_id", pa.int64()), *((task, pa.float32()) for task in TASKS)])


def schema(config: SyntheticConfig) -> Schema:
    """The schema of the stream.

    Tables of users and ads have twice the rows of those alive: a row is used again long after its
    owner has left.
    """
    ad = indexed("ad", 2 * config.ads)
    keywords = latent.CATEGORIES * latent.KEYWORDS_PER_CATEGORY + config.advertisers
    features = (
        indexed("user", 2 * config.users),
        ad,
        indexed("advertiser", config.advertisers),
        indexed("category", latent.CATEGORIES),
        indexed("segment", latent.SEGMENTS),
        indexed("hour", latent.HOURS),
        indexed("placement", latent.PLACEMENTS),
        indexed("device", latent.DEVICES),
        SparseFeature(
            name="keywords",
            kind=Kind.MULTI,
            encoding=Encoding.INDEX,
            rows=keywords + 1,
            max_length=latent.MOST_KEYWORDS,
        ),
        sequence("clicked_ads", ad, CLICKS),
    )
    return Schema(
        features=features,
        dense=tuple(DenseFeature(name=name) for name in DENSE),
        tasks=TASKS,
        domains=latent.DOMAINS,
        group_by="user",
    )


def truth_path(stream: AnyPath, window: int) -> AnyPath:
    """File of the true probabilities of a window."""
    folder = stream / "truth"
    return folder / f"{window_name(window)}.parquet"


class ClickLog:
    """For each user slot the table rows of the last clicked ads, right-aligned.

    Events of a window see the state at its start.
    """

    def __init__(self, users: int) -> None:
        self.rows_UL = np.zeros((users, CLICKS), np.int32)
        self.count_U = np.zeros(users, np.int64)
        self._next_rows_UL = self.rows_UL.copy()
        self._next_count_U = self.count_U.copy()

    def histories(self, user: Array) -> pa.ListArray:
        """The clicked ads of N events, list<int32>, the most recent last."""
        end = (user + 1) * CLICKS
        begin = user * CLICKS + CLICKS - self.count_U[user]
        flat = self.rows_UL.reshape(-1)
        lists = gather(flat, begin, end)
        return lists.cast(pa.list_(pa.int32()))

    def add(self, user: Array, ad_row: Array) -> None:
        """Add clicks in event order. They become visible with `publish`."""
        rows_UL = self._next_rows_UL
        count_U = self._next_count_U
        by_user = np.argsort(user, kind="stable")
        user = user[by_user]
        ad_row = ad_row[by_user]
        clicked, new = np.unique(user, return_counts=True)

        # The old clicks of each user move left by the number of new ones; those beyond the left
        # edge are forgotten.
        place = np.arange(CLICKS) + np.minimum(new, CLICKS)[:, None]
        room = np.zeros((len(clicked), CLICKS), np.int32)
        old = np.concatenate([rows_UL[clicked], room], axis=1)
        rows_UL[clicked] = np.take_along_axis(old, place, axis=1)

        last = np.repeat(np.cumsum(new), new)
        from_end = last - np.arange(len(user))
        recent = from_end <= CLICKS
        rows_UL[user[recent], CLICKS - from_end[recent]] = ad_row[recent]
        count_U[clicked] = np.minimum(count_U[clicked] + new, CLICKS)

    def publish(self, replaced: Array) -> None:
        """Make the clicks of a finished window visible.

        Args:
            replaced: slots that now belong to new users, who have clicked nothing.
        """
        self._next_count_U[replaced] = 0
        self.rows_UL = self._next_rows_UL.copy()
        self.count_U = self._next_count_U.copy()


class _Events(NamedTuple):
    """Who sees what, and where: six int64 arrays (N,); `user` and `ad` are slots."""

    user: Array
    ad: Array
    hour: Array
    placement: Array
    device: Array
    domain: Array


class Generator:
    """Draws the events of window after window, chunk by chunk."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        self.schema = schema(config)
        self.world = World(config)
        self.clicks = ClickLog(config.users)

    def window(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Yield packed events and their true probabilities, chunk by chunk, of the world's window.

        Afterwards the world is one window further.
        """
        snapshot = self.world.frozen()
        count = self.config.events_per_window
        starts = range(0, count, CHUNK_ROWS)
        for number, start in enumerate(starts):
            end = min(start + CHUNK_ROWS, count)
            yield self._chunk(snapshot, number, start, end)
        replaced = self.world.step()
        self.clicks.publish(replaced)

    def _chunk(
        self,
        snapshot: latent.Snapshot,
        number: int,
        start: int,
        end: int,
    ) -> tuple[pa.Table, pa.Table]:
        world = self.world
        rows = end - start
        draw = latent.random(self.config.seed, latent.CHUNK, world.window, number)
        events = self._draw(draw, rows)
        click_p, conversion_p = snapshot.probabilities(*events)
        luck = draw.random(rows, dtype=np.float32)  # one draw for both: a conversion is a click
        labels = np.stack([luck < click_p, luck < conversion_p], axis=1).astype(np.float32)
        example_id = np.arange(start, end) + world.window * self.config.events_per_window

        table = packed(
            self.schema,
            example_id,
            self._times(draw, start, end),
            events.domain,
            labels,
            self._sparse(events),
            self._dense(draw, snapshot, events),
            {
                "keywords": self._keywords(events.ad),
                "clicked_ads": self.clicks.histories(events.user),
            },
        )
        clicked = labels[:, 0] == 1
        ad_rows = self._ad_rows(events.ad[clicked])
        self.clicks.add(events.user[clicked], ad_rows)
        truth = [pa.array(example_id), pa.array(click_p), pa.array(conversion_p)]
        return table, pa.Table.from_arrays(truth, schema=ORACLE)

    def _draw(self, draw: np.random.Generator, rows: int) -> _Events:
        """Draw users, ads and contexts. The order of the draws is part of the stream's format."""
        user = _pick(self.world.user_zipf_U, draw.random(rows))
        ad = _pick(self.world.ad_zipf_A, draw.random(rows))
        hour = draw.integers(latent.HOURS, size=rows)
        placement = draw.integers(latent.PLACEMENTS, size=rows)
        device = draw.integers(latent.DEVICES, size=rows)
        domain = _pick(np.cumsum(latent.SHARES), draw.random(rows))
        return _Events(user, ad, hour, placement, device, domain)

    def _times(
        self,
        draw: np.random.Generator,
        start: int,
        end: int,
    ) -> Array:
        """Event times of one chunk: uniform over its part of the window, sorted."""
        count = self.config.events_per_window
        low = WINDOW_MS * start // count
        high = WINDOW_MS * end // count
        high = max(high, low + 1)
        offsets = draw.integers(low, high, size=end - start)
        offsets.sort()
        window_ms = self.world.window * WINDOW_MS
        return np.asarray(START_MS + window_ms + offsets)

    def _ad_rows(self, ad: Array) -> Array:
        """int32 (N,): table rows of ads."""
        ids = self.world.ad_id_A[ad]
        rows = ids % (2 * self.config.ads) + 1
        return np.asarray(rows.astype(np.int32))

    def _sparse(self, events: _Events) -> Array:
        """Table rows of the single-valued features in the schema's order: int32 (N, S)."""
        world = self.world
        advertiser = world.advertiser_A[events.ad]
        user_id = world.user_id_U[events.user]
        columns = [
            user_id % (2 * self.config.users) + 1,
            self._ad_rows(events.ad),
            advertiser + 1,
            world.advertiser_category_V[advertiser] + 1,
            world.segment_U[events.user] + 1,
            events.hour + 1,
            events.placement + 1,
            events.device + 1,
            events.domain + 1,
        ]
        return np.stack(columns, axis=1).astype(np.int32)

    def _dense(
        self,
        draw: np.random.Generator,
        snapshot: latent.Snapshot,
        events: _Events,
    ) -> Array:
        """Noisy observations of four latents, with a mean of about 0 and a standard deviation of
        about 1: float32 (N, D)."""
        columns = [
            snapshot.user_bias_U[events.user] / 0.4,
            snapshot.ad_bias_A[events.ad] / 0.4,
            snapshot.user_UK[events.user, 0],
            snapshot.ad_AK[events.ad, 0],
        ]
        observed = np.stack(columns, axis=1)
        unit_noise = draw.standard_normal(observed.shape, dtype=np.float32)
        noise = DENSE_NOISE * unit_noise
        variance = 1 + DENSE_NOISE**2
        scale = np.float32(np.sqrt(variance))
        values = (observed + noise) / scale
        return np.asarray(np.clip(values, -10, 10))

    def _keywords(self, ad: Array) -> pa.ListArray:
        """Table rows of the keywords of ads: N lists of int32."""
        rows = self.world.keywords_AW.reshape(-1) + 1
        begin = ad * latent.MOST_KEYWORDS
        end = begin + self.world.keyword_count_A[ad]
        lists = gather(rows, begin, end)
        return lists.cast(pa.list_(pa.int32()))


def _pick(cumulated: Array, uniform_N: Array) -> Array:
    """Draw items with the given cumulated probabilities from uniform numbers: int64 (N,)."""
    last = len(cumulated) - 1
    item_N = np.searchsorted(cumulated, uniform_N)
    return np.minimum(item_N, last)


def known_times(
    seed: int,
    window: int,
    number: int,
    times_N: Array,
) -> Array:
    """When the labels of a chunk's events become known, ms: int64 (N, 2).

    Delays are exponential and drawn separately from the events.
    """
    draw = latent.random(seed, latent.DELAY, window, number)
    means_s = (CLICK_DELAY_S, CONVERSION_DELAY_S)
    step_N2 = draw.exponential(means_s, (len(times_N), 2))
    delay_s_N2 = step_N2.cumsum(axis=1)
    delay_ms_N2 = np.round(delay_s_N2 * 1000).astype(np.int64)
    return np.asarray(times_N[:, None] + delay_ms_N2)


def write(
    config: Config,
    writer: StreamWriter,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write all windows and their true probabilities; returns statistics for the manifest."""
    settings = config.data.synthetic
    generator = Generator(settings)
    remaining = config.data.max_rows or settings.windows * settings.events_per_window
    total = 0
    while generator.world.window < settings.windows and remaining > 0:
        index = generator.world.window
        start_ms = START_MS + index * WINDOW_MS
        window = writer.window(index, start_ms, start_ms + WINDOW_MS)
        rows = _write_window(writer, window, generator, remaining)
        window.commit(0)
        total += rows
        remaining -= rows
        if progress:
            progress(index, rows)

    moments = {"count": float(total), "mean": 0.0, "std": 1.0}
    return {
        "rows": total,
        "duplicates": 0,
        "dense": {name: dict(moments) for name in DENSE},
    }


def _write_window(
    writer: StreamWriter,
    window: WindowWriter,
    generator: Generator,
    limit: int,
) -> int:
    """Write up to `limit` events of the generator's window and their true probabilities.

    Returns:
        The number of events.
    """
    seed = generator.config.seed
    path = truth_path(writer.root, window.index)
    rows = 0
    with _truth_writer(path, skip=window.committed) as truth:
        for number, (events, probabilities) in enumerate(generator.window()):
            count = min(len(events), limit - rows)
            events = events.slice(0, count)
            times_N = events["event_time"].to_numpy()
            known_NT = known_times(seed, window.index, number, times_N)
            window.append(events, known_NT)
            if truth and count:
                probabilities = probabilities.slice(0, count)
                truth.write_table(probabilities)
            rows += count
    return rows


@contextmanager
def _truth_writer(path: AnyPath, skip: bool) -> Iterator[pq.ParquetWriter | None]:
    if skip:
        yield None
        return
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, ORACLE, compression="zstd") as truth,
    ):
        yield truth
