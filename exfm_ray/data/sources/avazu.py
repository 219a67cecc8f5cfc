"""Avazu click log (Kaggle): CSV, ordered by hour. All columns are categories; `id` distinguishes
the events of an hour."""

from __future__ import annotations

from exfm_ray.config.root import Config
from exfm_ray.data.sources.base import RawSource, hashed, indexed, read_csv, require
from exfm_ray.schema import Schema

MANY = (
    "site_id",
    "site_domain",
    "app_id",
    "app_domain",
    "device_id",
    "device_ip",
    "device_model",
    "C14",
    "C17",
    "C20",
)
FEW = (
    "C1",
    "banner_pos",
    "site_category",
    "app_category",
    "device_type",
    "device_conn_type",
    "C15",
    "C16",
    "C18",
    "C19",
    "C21",
)


def source(config: Config) -> RawSource:
    """Events in the file's order, which is by hour.

    Ids exceed 63 bits, so examples get a running number.
    """
    path = require(config.data.root, "train.csv")
    rows = config.data.hash_rows
    types = {"id": "UBIGINT", "click": "DOUBLE", "hour": "VARCHAR"}
    types |= dict.fromkeys((*MANY, *FEW), "VARCHAR")
    table = read_csv([path], types)
    features = (
        *hashed(MANY, rows),
        *hashed(FEW, min(rows, 1_000)),
        indexed("hour_of_day", 24),
        indexed("weekday", 7),
    )
    columns = ", ".join((*MANY, *FEW))
    query = f"""
        SELECT epoch_ms(moment) AS event_time, id AS event_key, click, {columns},
               hour(moment) AS hour_of_day, isodow(moment) - 1 AS weekday
        FROM (SELECT *, strptime('20' || hour, '%Y%m%d%H') AS moment FROM {table})"""
    return RawSource(
        schema=Schema(features=features, tasks=("click",)),
        files=(path,),
        query=query,
    )
