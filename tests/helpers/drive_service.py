"""A driver that has a stream labelled on a Ray of its own: `python tests/das/drive.py FOLDER`,
killed and started again by test_faults."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import ray
from specs import make_order

from exfm_ray.das.client import label
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.data.stream import EventStream


def order_in(folder: Path) -> LabelingSpec:
    """Two actors; no fragment is parked for deaths that it has not brought about."""
    return make_order(folder, min_actors=2, max_actors=2, tries=50)


if __name__ == "__main__":
    order = order_in(Path(sys.argv[1]))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    label(
        order,
        EventStream.open(order.stream_root).windows(),
        lambda window, rows: None,
        lambda: None,
    )
    ray.shutdown()
