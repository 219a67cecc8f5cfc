"""Where relative folders lie: below EXFM_HOME, else below the working folder; in a Ray job never in the code uploaded for it."""

from __future__ import annotations

import os
from pathlib import Path

UPLOADS = "working_dir_files"
"""The folder of a Ray node in which uploaded code lies, one folder for each upload. Ray removes them when jobs or its session end."""


def placed() -> bool:
    """Whether relative folders lie elsewhere than below the working folder."""
    return bool(os.environ.get("EXFM_HOME")) or UPLOADS in Path.cwd().parts


def base() -> Path:
    """The folder that relative paths start from: EXFM_HOME, where it is not set ~/exfm-ray in a job's uploaded code, else the working
    folder. It does not depend on the code uploaded, so that a run goes on where it stopped."""
    if placed():
        return Path(os.environ.get("EXFM_HOME") or Path.home() / "exfm-ray").absolute()
    return Path.cwd()


def lasting(path: str | Path) -> Path:
    """`path` made absolute."""
    return base() / path
