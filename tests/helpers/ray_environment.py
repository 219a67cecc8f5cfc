"""Environment variables that Ray's processes inherit in tests."""

from __future__ import annotations

import os
from pathlib import Path

RAY_ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)]),
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
