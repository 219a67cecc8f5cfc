"""Tests of Arrow types."""

from __future__ import annotations

import pyarrow as pa
from pyarrow import types


def is_text(kind: pa.DataType) -> bool:
    """True for strings of any size."""
    return bool(types.is_string(kind) or types.is_large_string(kind))


def is_list(kind: pa.DataType) -> bool:
    """True for lists of variable length."""
    return bool(types.is_list(kind) or types.is_large_list(kind))


def is_number(kind: pa.DataType) -> bool:
    """True for integers, floats, decimals and booleans."""
    tests = (
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_decimal,
    )
    return any(test(kind) for test in tests)
