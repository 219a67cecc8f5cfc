"""Rows that are written into a table from outside, beside what it learns."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


class GivenRows(NamedTuple):
    """Rows to be written into a table: their numbers, int64 ascending (X), the rows (X, W), and their Adagrad state (X) unless they keep it."""

    id_X: np.ndarray[Any, np.dtype[np.int64]]
    row_XW: Tensor
    momentum_X: Tensor | None
