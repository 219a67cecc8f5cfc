"""What can be done about what was made of a snapshot and is lost or damaged."""

from __future__ import annotations

from exfm_ray.remote import Place


def made_again(folder: Place) -> str:
    """The way out of an error about a window's `folder`: only the snapshot that made it can make it again."""
    return f"with das.keep_snapshots=true from the start: remove {folder} and run the DAS again; without: start a run under another --name"
