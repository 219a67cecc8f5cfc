"""The synthetic stream: generated ad events whose true click and conversion probabilities are
known.

The truth goes to `<stream>/truth/window=000.parquet` (example_id, and one float32 column per task),
beside the events and not among them: metrics read it, models never do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
from exfm_ray.data.stream import StreamWriter, window_name
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
CLICK_DELAY_S, CONVERSION_DELAY_S = (
    120.0,
    43_200.0,
)  # means; a conversion is told that much after its click
ORACLE = pa.schema([("example_id", pa.int64()), *((task, pa.float32()) for task in TASKS)])


def schema(config: SyntheticConfig) -> Schema:
    """Tables of users and ads have twice the rows of those alive: a row is used again long after
    its owner has left."""
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
        dense=tuple(DenseFeature(name=n) for n in DENSE),
        tasks=TASKS,
        domains=latent.DOMAINS,
        group_by="user",
    )


def truth_path(stream: AnyPath, window: int) -> AnyPath:
    """Where the true probabilities of a window lie."""
    return stream / "truth" / f"{window_name(window)}.parquet"


class ClickLog:
    """Per user slot the rows of the last clicked ads, right-aligned. Events of a window see the
    state at its start."""

    def __init__(self, users: int) -> None:
        self.rows_UL = np.zeros((users, CLICKS), np.int32)
        self.count_U = np.zeros(users, np.int64)
        self._next = (self.rows_UL.copy(), self.count_U.copy())

    def histories(self, user: Array) -> pa.ListArray:
        """The clicked ads of N events, list<int32>, the most recent last."""
        begin = user * CLICKS + CLICKS - self.count_U[user]
        return gather(self.rows_UL.reshape(-1), begin, (user + 1) * CLICKS).cast(
            pa.list_(pa.int32())
        )

    def add(self, user: Array, ad_row: Array) -> None:
        """Clicks in event order, not visible before `publish`."""
        rows_UL, count_U = self._next
        order = np.argsort(user, kind="stable")
        user = user[order]
        ad_row = ad_row[order]
        clicked, new = np.unique(user, return_counts=True)
        from_end = np.repeat(np.cumsum(new), new) - np.arange(len(user))
        # The old clicks of each user move left by as many as are new; those beyond the left edge
        # are forgotten.
        place = np.arange(CLICKS) + np.minimum(new, CLICKS)[:, None]
        old = np.concatenate([rows_UL[clicked], np.zeros((len(clicked), CLICKS), np.int32)], axis=1)
        rows_UL[clicked] = np.take_along_axis(old, place, axis=1)
        recent = from_end <= CLICKS
        rows_UL[user[recent], CLICKS - from_end[recent]] = ad_row[recent]
        count_U[clicked] = np.minimum(count_U[clicked] + new, CLICKS)

    def publish(self, replaced: Array) -> None:
        """The window is over; the slots in `replaced` belong to new users, who have clicked
        nothing."""
        self._next[1][replaced] = 0
        self.rows_UL, self.count_U = self._next[0].copy(), self._next[1].copy()


class Generator:
    """Draws the events of window after window, chunk by chunk."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        self.schema = schema(config)
        self.world = World(config)
        self.clicks = ClickLog(config.users)

    def window(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Packed events and their truth, chunk by chunk, of the world's window; afterwards the
        world has moved on by one."""
        snapshot = self.world.frozen()
        count = self.config.events_per_window
        for number, start in enumerate(range(0, count, CHUNK_ROWS)):
            yield self._chunk(snapshot, number, start, min(start + CHUNK_ROWS, count))
        self.clicks.publish(self.world.step())

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
        user = np.minimum(
            np.searchsorted(world.user_zipf_U, draw.random(rows)), self.config.users - 1
        )
        ad = np.minimum(np.searchsorted(world.ad_zipf_A, draw.random(rows)), self.config.ads - 1)
        hour, placement, device = (
            draw.integers(n, size=rows) for n in (latent.HOURS, latent.PLACEMENTS, latent.DEVICES)
        )
        domain = np.minimum(
            np.searchsorted(np.cumsum(latent.SHARES), draw.random(rows)), len(latent.DOMAINS) - 1
        )
        click_p, conversion_p = snapshot.probabilities(user, ad, hour, placement, device, domain)
        luck = draw.random(rows, dtype=np.float32)  # one draw for both: a conversion is a click
        labels = np.stack([luck < click_p, luck < conversion_p], axis=1).astype(np.float32)
        example_id = np.arange(start, end) + world.window * self.config.events_per_window
        table = packed(
            self.schema,
            example_id,
            self._times(draw, start, end),
            domain,
            labels,
            self._sparse(user, ad, hour, placement, device, domain),
            self._dense(draw, snapshot, user, ad),
            {"keywords": self._keywords(ad), "clicked_ads": self.clicks.histories(user)},
        )
        clicked = labels[:, 0] == 1
        self.clicks.add(user[clicked], self._ad_rows(ad[clicked]))
        return table, pa.Table.from_arrays(
            [pa.array(example_id), pa.array(click_p), pa.array(conversion_p)], schema=ORACLE
        )

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
        offsets = np.sort(draw.integers(low, max(high, low + 1), size=end - start))
        return np.asarray(START_MS + self.world.window * WINDOW_MS + offsets)

    def _ad_rows(self, ad: Array) -> Array:
        return (self.world.ad_id_A[ad] % (2 * self.config.ads) + 1).astype(np.int32)

    def _sparse(
        self,
        user: Array,
        ad: Array,
        hour: Array,
        placement: Array,
        device: Array,
        domain: Array,
    ) -> Array:
        """Table rows of the single-valued features in the schema's order: int32 (N, S)."""
        world = self.world
        advertiser = self.world.advertiser_A[ad]
        user_row = world.user_id_U[user] % (2 * self.config.users) + 1
        ids = (
            advertiser,
            world.advertiser_category_V[advertiser],
            world.segment_U[user],
            hour,
            placement,
            device,
            domain,
        )
        return np.stack([user_row, self._ad_rows(ad), *(i + 1 for i in ids)], axis=1).astype(
            np.int32
        )

    def _dense(
        self,
        draw: np.random.Generator,
        snapshot: latent.Snapshot,
        user: Array,
        ad: Array,
    ) -> Array:
        """Noisy observations of four latents, of mean about 0 and standard deviation about 1:
        float32 (N, D)."""
        seen = np.stack(
            [
                snapshot.user_bias_U[user] / 0.4,
                snapshot.ad_bias_A[ad] / 0.4,
                snapshot.user_UK[user, 0],
                snapshot.ad_AK[ad, 0],
            ],
            axis=1,
        )
        noise = DENSE_NOISE * draw.standard_normal(seen.shape, dtype=np.float32)
        return np.asarray(
            np.clip((seen + noise) / np.float32(np.sqrt(1 + DENSE_NOISE**2)), -10, 10)
        )

    def _keywords(self, ad: Array) -> pa.ListArray:
        begin = ad * latent.MOST_KEYWORDS
        rows = self.world.keywords_AW.reshape(-1) + 1
        return gather(rows, begin, begin + self.world.keyword_count_A[ad]).cast(
            pa.list_(pa.int32())
        )


def known_times(
    seed: int,
    window: int,
    number: int,
    times_N: Array,
) -> Array:
    """When the labels of a chunk's events would be known, ms: int64 (N, 2). Delays are exponential
    and drawn apart from the events."""
    draw = latent.random(seed, latent.DELAY, window, number)
    delay_N2 = draw.exponential((CLICK_DELAY_S, CONVERSION_DELAY_S), (len(times_N), 2)).cumsum(
        axis=1
    )
    return np.asarray(times_N[:, None] + np.round(delay_N2 * 1000).astype(np.int64))


def write(
    config: Config,
    writer: StreamWriter,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write all windows and their truth; what the stream's manifest says of them."""
    settings = config.data.synthetic
    generator = Generator(settings)
    left = config.data.max_rows or settings.windows * settings.events_per_window
    total = 0
    while generator.world.window < settings.windows and left > 0:
        index = generator.world.window
        start_ms = START_MS + index * WINDOW_MS
        window = writer.window(index, start_ms, start_ms + WINDOW_MS)
        rows = 0
        with _truth_writer(truth_path(writer.root, index), skip=window.committed) as truth:
            for number, (events, probabilities) in enumerate(generator.window()):
                kept = min(len(events), left)
                known_NT = known_times(
                    settings.seed, index, number, events["event_time"].to_numpy()[:kept]
                )
                window.append(events.slice(0, kept), known_NT)
                if truth and kept:
                    truth.write_table(probabilities.slice(0, kept))
                rows = rows + kept
                left = left - kept
        window.commit(0)
        total += rows
        if progress:
            progress(index, rows)
    return {
        "rows": total,
        "duplicates": 0,
        "dense": {n: {"count": float(total), "mean": 0.0, "std": 1.0} for n in DENSE},
    }


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
