"""A driver that labels a stream on its own Ray: `python tests/helpers/drive_service.py FOLDER`.

test_faults kills it and starts it again.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import ray
from specs import make_spec

from exfm_ray.das.client import label
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.data.stream import EventStream


def spec_in(folder: Path) -> LabelingSpec:
    """Return a spec with two actors; kills that a fragment did not cause do not make it fail."""
    return make_spec(folder, min_actors=2, max_actors=2, tries=50)


if __name__ == "__main__":
    spec = spec_in(Path(sys.argv[1]))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    label(
        spec,
        EventStream.open(spec.stream_root).windows(),
        lambda window, rows: None,
        lambda: None,
    )
    ray.shutdown()
