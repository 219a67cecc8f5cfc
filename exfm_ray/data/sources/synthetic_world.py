"""The hidden world of the synthetic stream: users and ads, their latent vectors, and how these
change window by window.

Shapes: U users, A ads, V advertisers, C categories, S segments, K latent dimensions, D domains, W
keywords of an ad, X contexts, P placements, E devices, N events, B slots that get a new owner.
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
AGE_LOSS = 0.5  # an ad's logit falls by up to AGE_LOSS,
AGE_SCALE = 8.0  # with a time constant of AGE_SCALE windows
SHIFT = np.pi / 6
KEYWORDS_PER_CATEGORY = 8
MOST_KEYWORDS = 4
# What a random stream is for.
ROOT = 0
STEP = 1
CHUNK = 2
DELAY = 3


def random(seed: int, *purpose: int) -> np.random.Generator:
    """The random stream of one purpose: the same for the same seed, whatever was drawn before."""
    sequence = np.random.SeedSequence([seed, *purpose])
    bits = np.random.SFC64(sequence)
    return np.random.Generator(bits)


def _scaled(vectors: Array) -> Array:
    """Scale vectors to length sqrt(K)."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors * np.sqrt(K) / length)


class World:
    """Latents at one window. `step` goes to the next window, always the same way for the same
    seed."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        self.window = 0
        draw = random(config.seed, ROOT)
        self._draw_constants(draw)

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
        # At the start the world has been running for long.
        mean_age = 1 / max(config.churn, 0.02)
        self.ad_born_A -= draw.exponential(mean_age, ads)

    def _draw_constants(self, draw: np.random.Generator) -> None:
        """Draw what stays the same in all windows. The order of the draws is part of the format."""
        config = self.config
        normal = draw.standard_normal
        self.category_CK = normal((CATEGORIES, K))
        self.advertiser_category_V = draw.integers(CATEGORIES, size=config.advertisers)
        base_VK = self.category_CK[self.advertiser_category_V]
        self.advertiser_VK = base_VK + 0.6 * normal((config.advertisers, K))
        self.segment_SK = normal((SEGMENTS, K))
        self.hour_K = normal((HOURS, K))
        self.placement_K = normal((PLACEMENTS, K))
        self.device_K = normal((DEVICES, K))
        self.matrix_DKK = np.eye(K) + 0.3 * normal((len(DOMAINS), K, K)) / np.sqrt(K)
        self.conversion_KK = normal((K, K)) / np.sqrt(K)
        # Each segment's interests turn in planes of its own: half of K planes and one angle, so a
        # vector turns by that angle.
        random_SKK = normal((SEGMENTS, K, K))
        self.plane_SKK = np.linalg.qr(random_SKK)[0]
        self.user_zipf_U = _zipf(config.users)
        self.ad_zipf_A = _zipf(config.ads)

    def _new_users(self, draw: np.random.Generator, slots: Array) -> None:
        count = len(slots)
        segment_B = draw.integers(SEGMENTS, size=count)
        taste_BK = self.segment_SK[segment_B] + 0.8 * draw.standard_normal((count, K))
        self.segment_U[slots] = segment_B
        self.user_UK[slots] = _scaled(taste_BK)
        self.user_bias_U[slots] = draw.standard_normal(count)

    def _new_ads(self, draw: np.random.Generator, slots: Array) -> None:
        count = len(slots)
        advertiser_B = draw.integers(self.config.advertisers, size=count)
        style_BK = self.advertiser_VK[advertiser_B] + 0.6 * draw.standard_normal((count, K))
        self.advertiser_A[slots] = advertiser_B
        self.ad_AK[slots] = _scaled(style_BK)
        self.ad_bias_A[slots] = draw.standard_normal(count)
        self.ad_born_A[slots] = self.window

        category_B = self.advertiser_category_V[advertiser_B]
        word_BW = draw.integers(KEYWORDS_PER_CATEGORY, size=(count, MOST_KEYWORDS))
        word_BW = category_B[:, None] * KEYWORDS_PER_CATEGORY + word_BW
        # The first keyword is the advertiser's brand.
        word_BW[:, 0] = CATEGORIES * KEYWORDS_PER_CATEGORY + advertiser_B
        self.keywords_AW[slots] = word_BW
        self.keyword_count_A[slots] = draw.integers(1, MOST_KEYWORDS + 1, size=count)

    def step(self) -> Array:
        """Go to the next window: interests turn, some users and ads are replaced.

        Returns:
            The slots of the new users.
        """
        self.window += 1
        config = self.config
        draw = random(config.seed, STEP, self.window)
        angle = config.drift
        if config.shift_at == self.window:
            angle += SHIFT
        self._turn(angle)

        new_users = round(config.churn * config.users)
        new_ads = round(config.churn * config.ads)
        users = draw.choice(config.users, size=new_users, replace=False)
        ads = draw.choice(config.ads, size=new_ads, replace=False)
        self._new_users(draw, users)
        self._new_ads(draw, ads)
        self.user_id_U[users] = self.next_user + np.arange(new_users)
        self.ad_id_A[ads] = self.next_ad + np.arange(new_ads)
        self.next_user += new_users
        self.next_ad += new_ads
        return np.asarray(users)

    def _turn(self, angle: float) -> None:
        """Turn every user and segment vector by `angle` in the planes of the segment."""
        cos = np.cos(angle)
        sin = np.sin(angle)
        rotation = np.array([[cos, -sin], [sin, cos]])
        block_KK = np.kron(np.eye(K // 2), rotation)
        transposed_SKK = self.plane_SKK.transpose(0, 2, 1)
        turn_SKK = self.plane_SKK @ block_KK @ transposed_SKK

        self.segment_SK = np.einsum("sk,skl->sl", self.segment_SK, turn_SKK)
        for segment in range(SEGMENTS):
            members = self.segment_U == segment
            self.user_UK[members] = self.user_UK[members] @ turn_SKK[segment]

    def frozen(self) -> Snapshot:
        """The latents from which the events of this window are drawn."""
        return Snapshot(self)


class Snapshot:
    """The latents of a window, multiplied out as far as users, ads and contexts allow; float32, for
    speed."""

    def __init__(self, world: World) -> None:
        root_k = np.float32(np.sqrt(K))
        self.world = world
        self.user_UK = _float32(world.user_UK)
        self.ad_AK = _float32(world.ad_AK)
        self.seen_DUK = _float32(world.user_UK @ world.matrix_DKK) / root_k
        self.wish_UK = _float32(world.user_UK @ world.conversion_KK) / root_k
        self.context_XK = _contexts(world)
        self.user_placement_UP = _float32(0.6 / K * world.user_UK @ world.placement_K.T)
        self.ad_device_AE = _float32(world.ad_AK @ world.device_K.T)
        self.user_bias_U = _float32(0.4 * world.user_bias_U)

        age_A = world.window - world.ad_born_A
        age_loss_A = AGE_LOSS * (1 - np.exp(-age_A / AGE_SCALE))
        self.ad_bias_A = _float32(0.4 * world.ad_bias_A - age_loss_A)
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
        ad_NK = self.ad_AK[ad]
        context_N = (hour * PLACEMENTS + placement) * DEVICES + device
        context_NK = self.context_XK[context_N]
        mixed_NK = self.seen_DUK[domain, user] + self.user_UK[user] * context_NK
        match_N = np.einsum("nk,nk->n", mixed_NK, ad_NK)
        logit_N = match_N + self.bias_D[domain] + self.user_bias_U[user] + self.ad_bias_A[ad]
        logit_N += self.user_placement_UP[user, placement] * self.ad_device_AE[ad, device]
        click_N = _sigmoid(logit_N)

        wish_N = np.einsum("nk,nk->n", self.wish_UK[user], ad_NK)
        conversion_logit_N = 0.5 * wish_N - 2.2 + self.ad_bias_A[ad]
        return click_N, click_N * _sigmoid(conversion_logit_N)


def _contexts(world: World) -> Array:
    """float32 (X, K): a vector for each hour, placement and device."""
    hour = world.hour_K[:, None, None]
    placement = world.placement_K[None, :, None]
    device = world.device_K[None, None]
    context = (hour + placement + device) / np.sqrt(3)
    context_XK = context.reshape(-1, K)
    return _float32(0.8 / np.sqrt(K) * context_XK)


def _float32(values: Array) -> Array:
    return np.ascontiguousarray(values, np.float32)


def _sigmoid(logit: Array) -> Array:
    """Probabilities of logits: float32."""
    odds_against = np.exp(-logit)
    inverse = 1 + odds_against
    probability = 1 / inverse
    return np.asarray(probability, np.float32)


def _zipf(count: int) -> Array:
    """Cumulated probabilities of ranks 1..count."""
    ranks = np.arange(1, count + 1)
    weights = ranks**-ZIPF
    total = weights.sum()
    cumulated = np.cumsum(weights)
    return np.asarray(cumulated / total)
