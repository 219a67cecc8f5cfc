"""KuaiRand (https://kuairand.com): impressions of a short-video app. `tab`, the surface shown on,
is the domain.

Left out on purpose: every column written after the impression (play time, follows, profile visits
...), the table of video statistics (whole-month averages, which hold the future) and
`visible_status` (as of the crawl, not the impression).
"""

from __future__ import annotations

from pathlib import Path

from exfm_ray.config.root import Config
from exfm_ray.data.prepare.sequence_feature import History
from exfm_ray.data.sources.base import (
    RawSource,
    hashed,
    indexed,
    read_csv,
    require,
    require_glob,
    sequence,
    sql_identifier,
)
from exfm_ray.schema import DenseFeature, Kind, Schema, SparseFeature

TABS = 15
USERS, VIDEOS = 27_285, 7_583  # KuaiRand-Pure numbers them from 0
CLICKS = 20
UTC_OFFSET_US = (
    8 * 3600 * 1_000_000
)  # the app's time zone; `date` and `hourmin` run up to two hours ahead of `time_ms`
USER_TRAITS = (
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
)
ONEHOTS = tuple(f"onehot_feat{i}" for i in range(18))
COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
VIDEO_TEXTS = ("video_type", "upload_type")
VIDEO_NUMBERS = ("author_id", "music_id", "music_type")
SIZES = ("server_width", "server_height")
LOG = dict.fromkeys(("user_id", "video_id", "time_ms", "duration_ms", "tab"), "BIGINT")
TASKS = ("is_click", "long_view", "is_like")
# When a label is known: a click starts the video; how long it was viewed, and whether it is liked
# by then, when it has been played.
KNOWN = {
    "is_click": "l.time_ms",
    "long_view": "l.time_ms + l.play_time_ms",
    "is_like": "l.time_ms + l.play_time_ms",
}


def source(config: Config) -> RawSource:
    """The standard log with the tables of users and videos; all files as the publisher names
    them."""
    root = config.data.root
    rows = config.data.hash_rows
    logs = require_glob(root, "log_standard_*.csv")
    users = require(root, "user_features_pure.csv")
    videos = require(root, "video_features_basic_pure.csv")
    label_time_tasks = tuple(task for task in TASKS if task in config.data.delayed)
    return RawSource(
        schema=_schema(rows),
        files=(*logs, users, videos),
        query=_query(logs, users, videos, label_time_tasks),
        label_time_tasks=label_time_tasks,
        history=History(
            feature="clicked_videos",
            user="user_id",
            item="video_id",
            label="is_click",
            length=CLICKS,
        ),
    )


def _schema(rows: int) -> Schema:
    few = min(rows, 1_000)
    video = indexed("video_id", VIDEOS)
    features = [
        indexed("user_id", USERS),
        video,
        *hashed(USER_TRAITS, few),
        *hashed(ONEHOTS, min(rows, 5_000)),
        *hashed(("author_id", "music_id"), rows),
        *hashed((*VIDEO_TEXTS, "music_type"), few),
        indexed("hour", 24),
        indexed("weekday", 7),
        SparseFeature(name="tag", kind=Kind.MULTI, rows=few, max_length=8),
        sequence("clicked_videos", video, CLICKS),
    ]
    dense = [
        DenseFeature(name=n, transform="log1p")
        for n in (*COUNTS, "duration_ms", *SIZES, "video_age_days")
    ]
    return Schema(
        features=tuple(features),
        dense=tuple(dense),
        tasks=TASKS,
        domains=tuple(str(t) for t in range(TABS)),
        group_by="user_id",
    )


def _query(
    logs: tuple[Path, ...],
    users: Path,
    videos: Path,
    label_time_tasks: tuple[str, ...],
) -> str:
    """Event order is by time, then as in the files, so that ties do not depend on the sort."""
    log = read_csv(
        logs,
        LOG
        | dict.fromkeys(TASKS, "DOUBLE")
        | ({"play_time_ms": "BIGINT"} if label_time_tasks else {}),
    )
    known = "".join(
        f", {KNOWN[task]} AS {sql_identifier('known:' + task)}" for task in label_time_tasks
    )
    user = read_csv([users], {"user_id": "BIGINT"} | dict.fromkeys((*ONEHOTS, *COUNTS), "DOUBLE"))
    numbers = ("video_id", *VIDEO_NUMBERS)
    video = read_csv(
        [videos],
        dict.fromkeys((*numbers, *SIZES), "DOUBLE") | {"upload_dt": "DATE", "tag": "VARCHAR"},
    )
    # The publisher wrote some integer columns as 1.0: one value, one form.
    user_columns = ", ".join(
        [*(f"u.{c}" for c in (*USER_TRAITS, *COUNTS)), *(f"u.{c}::BIGINT AS {c}" for c in ONEHOTS)]
    )
    video_columns = ", ".join(
        [
            *(f"v.{c}" for c in (*VIDEO_TEXTS, *SIZES)),
            *(f"v.{c}::BIGINT AS {c}" for c in VIDEO_NUMBERS),
        ]
    )
    return f"""
        WITH log AS (SELECT *, row_number() OVER () AS place, make_timestamp(time_ms * 1000 + {UTC_OFFSET_US}) AS moment FROM {log}),
             users AS (SELECT * FROM {user} QUALIFY row_number() OVER (PARTITION BY user_id) = 1),
             videos AS (SELECT * FROM {video} QUALIFY row_number() OVER (PARTITION BY video_id) = 1)
        SELECT l.time_ms AS event_time, l.tab::VARCHAR AS domain, l.is_click, l.long_view, l.is_like, l.user_id, l.video_id,
               {user_columns}, {video_columns}, string_split(v.tag, ',') AS tag, hour(l.moment) AS hour, isodow(l.moment) - 1 AS weekday,
               l.duration_ms::DOUBLE AS duration_ms, (l.moment::DATE - v.upload_dt)::DOUBLE AS video_age_days{known}
        FROM log l LEFT JOIN users u ON l.user_id = u.user_id LEFT JOIN videos v ON l.video_id = v.video_id
        ORDER BY l.time_ms, l.place"""
