"""The error that is written for users, and suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a setting, a file or the data: what is wrong, where, and the way out.

    The command line prints it as one line without a traceback and exits with 2. Every other error
    is a bug in the program and keeps its traceback.
    """


def nearest(word: str, words: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the known word nearest to `word`, or an empty string."""
    by_lower_case = {known.lower(): known for known in words}
    matches = difflib.get_close_matches(word.lower(), list(by_lower_case), n=1, cutoff=0.6)
    if not matches:
        return ""
    return f" Did you mean '{by_lower_case[matches[0]]}'?"
