"""`python -m exfm_ray`: the command line."""

from __future__ import annotations

import sys

from exfm_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], prog="python -m exfm_ray"))
