"""What the supervision of an order lacks, as its files tell it."""

from __future__ import annotations

from typing import Any

from exfm_ray.das.order import Order
from exfm_ray.data.stream import EventStream
from exfm_ray.files import read_json


def parked(order: Order) -> list[dict[str, Any]]:
    """What has failed too often and is not done, see `backlog.Parked`; with the teacher's name."""
    rows = read_json(order.parked_list) if order.parked_list.exists() else []
    return [{"teacher": order.store.teacher, **row} for row in rows if not order.has(row["window"])]


def stood_in(order: Order) -> list[dict[str, Any]]:
    """The windows that an older snapshot has scored, in the place of one that is left out."""
    done = [order.store.manifest(window) for window in EventStream.open(order.stream_root).windows() if order.store.has(window)]
    return [m.model_dump(include={"teacher", "window", "asked", "snapshot"}) for m in done if m.asked is not None]
