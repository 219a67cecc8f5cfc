"""A driver that labels a stream on its own Ray: `python tests/helpers/drive_service.py FOLDER`.

test_faults kills it and starts it again.
"""

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
    """Return a spec with two actors; kills that a fragment did not cause do not make it fail."""
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
