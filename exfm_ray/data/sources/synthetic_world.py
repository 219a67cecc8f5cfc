"""The hidden world of the synthetic stream: users and ads, their latent vectors, and how these
change window by window.

Shapes: U users, A ads, V advertisers, C categories, S segments, K latent dimensions, D domains.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from exfm_ray.config.data import SyntheticConfig

Array = np.ndarray[Any, Any]

K = 8
CATEGORIES = 24
SEGMENTS = 16
HOURS = 24
PLACEMENTS = 8
DEVICES = 4
ZIPF = 0.8
DOMAINS = ("feed", "search", "stories", "marketplace")
SHARES = (0.55, 0.25, 0.15, 0.05)
BIASES = (-1.9, -2.7, -1.4, -5.3)  # click rates of about 17, 10, 23 and 1 %
AGE_LOSS, AGE_SCALE = (
    0.5,
    8.0,
)  # an ad's logit falls by up to AGE_LOSS, with a time constant of AGE_SCALE windows
SHIFT = np.pi / 6
KEYWORDS_PER_CATEGORY = 8
MOST_KEYWORDS = 4
ROOT, STEP, CHUNK, DELAY = 0, 1, 2, 3  # what a random stream is for


def random(seed: int, *what: int) -> np.random.Generator:
    """The random stream of one purpose: the same for the same seed, whatever was drawn before."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, *what])))


def _long(vectors: Array) -> Array:
    """Scaled to length sqrt(K)."""
    return np.asarray(vectors * np.sqrt(K) / np.linalg.norm(vectors, axis=-1, keepdims=True))


class World:
    """Latents at one window. `step` moves on by one window, always the same way for the same
    seed."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        self.window = 0
        draw = random(config.seed, ROOT)
        normal = draw.standard_normal
        self.category_CK = normal((CATEGORIES, K))
        self.advertiser_category_V = draw.integers(CATEGORIES, size=config.advertisers)
        self.advertiser_VK = self.category_CK[self.advertiser_category_V] + 0.6 * normal(
            (config.advertisers, K)
        )
        self.segment_SK = normal((SEGMENTS, K))
        self.hour_K = normal((HOURS, K))
        self.placement_K = normal((PLACEMENTS, K))
        self.device_K = normal((DEVICES, K))
        self.matrix_DKK = np.eye(K) + 0.3 * normal((len(DOMAINS), K, K)) / np.sqrt(K)
        self.conversion_KK = normal((K, K)) / np.sqrt(K)
        # Each segment's interests turn in planes of its own: half of K planes, one angle, so a
        # vector turns by that angle.
        self.plane_SKK = np.linalg.qr(normal((SEGMENTS, K, K)))[0]
        self.user_zipf_U = _zipf(config.users)
        self.ad_zipf_A = _zipf(config.ads)

        users = config.users
        ads = config.ads
        self.user_id_U = np.arange(users)
        self.ad_id_A = np.arange(ads)
        self.next_user = users
        self.next_ad = ads
        self.segment_U = np.zeros(users, np.int64)
        self.user_UK = np.zeros((users, K))
        self.user_bias_U = np.zeros(users)
        self.advertiser_A = np.zeros(ads, np.int64)
        self.ad_AK = np.zeros((ads, K))
        self.ad_bias_A = np.zeros(ads)
        self.ad_born_A = np.zeros(ads)
        self.keywords_AW = np.zeros((ads, MOST_KEYWORDS), np.int64)
        self.keyword_count_A = np.zeros(ads, np.int64)
        self._new_users(draw, np.arange(users))
        self._new_ads(draw, np.arange(ads))
        self.ad_born_A -= draw.exponential(
            1 / max(config.churn, 0.02), ads
        )  # a world that has been running for long

    def _new_users(self, draw: np.random.Generator, slots: Array) -> None:
        segment = draw.integers(SEGMENTS, size=len(slots))
        self.segment_U[slots] = segment
        self.user_UK[slots] = _long(
            self.segment_SK[segment] + 0.8 * draw.standard_normal((len(slots), K))
        )
        self.user_bias_U[slots] = draw.standard_normal(len(slots))

    def _new_ads(self, draw: np.random.Generator, slots: Array) -> None:
        advertiser = draw.integers(self.config.advertisers, size=len(slots))
        self.advertiser_A[slots] = advertiser
        self.ad_AK[slots] = _long(
            self.advertiser_VK[advertiser] + 0.6 * draw.standard_normal((len(slots), K))
        )
        self.ad_bias_A[slots] = draw.standard_normal(len(slots))
        self.ad_born_A[slots] = self.window
        category = self.advertiser_category_V[advertiser, None]
        words = category * KEYWORDS_PER_CATEGORY + draw.integers(
            KEYWORDS_PER_CATEGORY, size=(len(slots), MOST_KEYWORDS)
        )
        words[:, 0] = (
            CATEGORIES * KEYWORDS_PER_CATEGORY + advertiser
        )  # the brand's own keyword first
        self.keywords_AW[slots] = words
        self.keyword_count_A[slots] = draw.integers(1, MOST_KEYWORDS + 1, size=len(slots))

    def step(self) -> Array:
        """Go to the next window: interests turn, some users and ads are replaced. Returns the slots
        of the new users."""
        self.window += 1
        config = self.config
        draw = random(self.config.seed, STEP, self.window)
        self._turn(config.drift + (SHIFT if config.shift_at == self.window else 0.0))
        users = draw.choice(config.users, size=round(config.churn * config.users), replace=False)
        ads = draw.choice(config.ads, size=round(config.churn * config.ads), replace=False)
        self._new_users(draw, users)
        self._new_ads(draw, ads)
        self.user_id_U[users] = self.next_user + np.arange(len(users))
        self.ad_id_A[ads] = self.next_ad + np.arange(len(ads))
        self.next_user, self.next_ad = self.next_user + len(users), self.next_ad + len(ads)
        return np.asarray(users)

    def _turn(self, angle: float) -> None:
        """Turn every user and segment vector by `angle` in the planes of the segment."""
        cos = np.cos(angle)
        sin = np.sin(angle)
        block = np.kron(np.eye(K // 2), np.array([[cos, -sin], [sin, cos]]))
        turn_SKK = self.plane_SKK @ block @ self.plane_SKK.transpose(0, 2, 1)
        self.segment_SK = np.einsum("sk,skl->sl", self.segment_SK, turn_SKK)
        for segment in range(SEGMENTS):
            members = self.segment_U == segment
            self.user_UK[members] = self.user_UK[members] @ turn_SKK[segment]

    def frozen(self) -> Snapshot:
        """What the events of this window are drawn from."""
        return Snapshot(self)


class Snapshot:
    """A window's latents, multiplied out as far as users, ads and contexts allow; float32, for
    speed."""

    def __init__(self, world: World) -> None:
        def small(values: Array) -> Array:
            return np.ascontiguousarray(values, np.float32)

        age_A = world.window - world.ad_born_A
        self.world = world
        self.user_UK = small(world.user_UK)
        self.ad_AK = small(world.ad_AK)
        self.seen_DUK = small(world.user_UK @ world.matrix_DKK) / np.float32(np.sqrt(K))
        self.wish_UK = small(world.user_UK @ world.conversion_KK) / np.float32(np.sqrt(K))
        context = (
            world.hour_K[:, None, None]
            + world.placement_K[None, :, None]
            + world.device_K[None, None]
        ) / np.sqrt(3)
        self.context_XK = small(0.8 / np.sqrt(K) * context.reshape(-1, K))
        self.user_placement_UP = small(0.6 / K * world.user_UK @ world.placement_K.T)
        self.ad_device_AE = small(world.ad_AK @ world.device_K.T)
        self.user_bias_U = small(0.4 * world.user_bias_U)
        self.ad_bias_A = small(0.4 * world.ad_bias_A - AGE_LOSS * (1 - np.exp(-age_A / AGE_SCALE)))
        self.bias_D = np.array(BIASES, np.float32)

    def probabilities(
        self,
        user: Array,
        ad: Array,
        hour: Array,
        placement: Array,
        device: Array,
        domain: Array,
    ) -> tuple[Array, Array]:
        """True probability of a click, and of a click with a conversion: two float32 (N,)."""
        a_NK = self.ad_AK[ad]
        context_N = (hour * PLACEMENTS + placement) * DEVICES + device
        mixed_NK = self.seen_DUK[domain, user] + self.user_UK[user] * self.context_XK[context_N]
        logit = (
            np.einsum("nk,nk->n", mixed_NK, a_NK)
            + self.bias_D[domain]
            + self.user_bias_U[user]
            + self.ad_bias_A[ad]
        )
        logit += self.user_placement_UP[user, placement] * self.ad_device_AE[ad, device]
        wish = 0.5 * np.einsum("nk,nk->n", self.wish_UK[user], a_NK) - 2.2 + self.ad_bias_A[ad]
        click = _sigmoid(logit)
        return click, click * _sigmoid(wish)


def _sigmoid(logit: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-logit)), np.float32)


def _zipf(count: int) -> Array:
    """Cumulated probabilities of ranks 1..count."""
    weights = np.arange(1, count + 1) ** -ZIPF
    return np.asarray(np.cumsum(weights) / weights.sum())
