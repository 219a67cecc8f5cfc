"""KuaiRand (https://kuairand.com): impressions of a short-video app. The domain is `tab`, the
surface on which a video was shown.

Left out on purpose: every column written after the impression (play time, follows, profile visits
...), the table of video statistics (whole-month averages, which contain the future) and
`visible_status` (its value at crawl time, not at the impression).
"""

from __future__ import annotations

from collections.abc import Iterable
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
USERS = 27_285  # KuaiRand-Pure numbers users and videos from 0
VIDEOS = 7_583
CLICKS = 20
# The app's time zone. `date` and `hourmin` run up to two hours ahead of `time_ms`.
UTC_OFFSET_US = 8 * 3600 * 1_000_000
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
# When a label is known. A click starts the video, so it is known at once. Whether the view was
# long, and whether the video is liked by then, is known when the video has been played.
KNOWN = {
    "is_click": "l.time_ms",
    "long_view": "l.time_ms + l.play_time_ms",
    "is_like": "l.time_ms + l.play_time_ms",
}


def source(config: Config) -> RawSource:
    """The standard log with the tables of users and videos, under the publisher's file names."""
    root = config.data.root
    logs = require_glob(root, "log_standard_*.csv")
    users = require(root, "user_features_pure.csv")
    videos = require(root, "video_features_basic_pure.csv")
    label_time_tasks = tuple(task for task in TASKS if task in config.data.delayed)
    return RawSource(
        schema=_schema(config.data.hash_rows),
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
    features = (
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
    )
    numbers = (*COUNTS, "duration_ms", *SIZES, "video_age_days")
    dense = [DenseFeature(name=name, transform="log1p") for name in numbers]
    return Schema(
        features=features,
        dense=tuple(dense),
        tasks=TASKS,
        domains=tuple(str(tab) for tab in range(TABS)),
        group_by="user_id",
    )


def _query(
    logs: tuple[Path, ...],
    users: Path,
    videos: Path,
    label_time_tasks: tuple[str, ...],
) -> str:
    """Events ordered by time, then as in the files, so that ties do not depend on the sort."""
    log = _log_table(logs, label_time_tasks)
    user = _user_table(users)
    video = _video_table(videos)
    # The publisher wrote some integer columns as 1.0. The cast gives each value one form.
    user_columns = _columns("u", (*USER_TRAITS, *COUNTS), ONEHOTS)
    video_columns = _columns("v", (*VIDEO_TEXTS, *SIZES), VIDEO_NUMBERS)
    known = ""
    for task in label_time_tasks:
        known += f", {KNOWN[task]} AS {sql_identifier('known:' + task)}"
    return f"""
        WITH log AS (
                 SELECT *, row_number() OVER () AS place,
                        make_timestamp(time_ms * 1000 + {UTC_OFFSET_US}) AS moment
                 FROM {log}),
             users AS (
                 SELECT * FROM {user}
                 QUALIFY row_number() OVER (PARTITION BY user_id) = 1),
             videos AS (
                 SELECT * FROM {video}
                 QUALIFY row_number() OVER (PARTITION BY video_id) = 1)
        SELECT l.time_ms AS event_time, l.tab::VARCHAR AS domain,
               l.is_click, l.long_view, l.is_like, l.user_id, l.video_id,
               {user_columns}, {video_columns}, string_split(v.tag, ',') AS tag,
               hour(l.moment) AS hour, isodow(l.moment) - 1 AS weekday,
               l.duration_ms::DOUBLE AS duration_ms,
               (l.moment::DATE - v.upload_dt)::DOUBLE AS video_age_days{known}
        FROM log l
             LEFT JOIN users u ON l.user_id = u.user_id
             LEFT JOIN videos v ON l.video_id = v.video_id
        ORDER BY l.time_ms, l.place"""


def _log_table(logs: tuple[Path, ...], label_time_tasks: tuple[str, ...]) -> str:
    types = LOG | dict.fromkeys(TASKS, "DOUBLE")
    if label_time_tasks:
        types["play_time_ms"] = "BIGINT"
    return read_csv(logs, types)


def _user_table(users: Path) -> str:
    numbers = (*ONEHOTS, *COUNTS)
    types = dict.fromkeys(numbers, "DOUBLE")
    types["user_id"] = "BIGINT"
    return read_csv([users], types)


def _video_table(videos: Path) -> str:
    numbers = ("video_id", *VIDEO_NUMBERS, *SIZES)
    types = dict.fromkeys(numbers, "DOUBLE")
    types["upload_dt"] = "DATE"
    types["tag"] = "VARCHAR"
    return read_csv([videos], types)


def _columns(
    table: str,
    plain: Iterable[str],
    integers: Iterable[str],
) -> str:
    """The select list of a table's columns; those in `integers` are cast."""
    selected = [f"{table}.{column}" for column in plain]
    for column in integers:
        selected.append(f"{table}.{column}::BIGINT AS {column}")
    return ", ".join(selected)
