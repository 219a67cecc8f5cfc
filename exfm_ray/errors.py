"""The one error a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a setting, a file or the data: says what is wrong, where, and the way out.

    `run.py` prints it as one line without a traceback and exits with 2. Everything else that goes
    wrong is a fault of the program and keeps its traceback.
    """


def nearest(word: str, words: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known word nearest to `word`, or an empty string."""
    known = {w.lower(): w for w in words}
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{known[close[0]]}'?" if close else ""
