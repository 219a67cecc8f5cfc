#!/usr/bin/env python
"""The command line, for a checkout that is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from exfm_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
