"""From raw values to table rows: stable hashing, checked indices, labels and domains. No function
loops over rows.

Shapes: N values, U distinct values.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from exfm_ray.data.arrow_types import is_text
from exfm_ray.data.prepare.hash_collisions import Watch
from exfm_ray.errors import UserError, nearest
from exfm_ray.schema import Encoding, Schema, SparseFeature

Array = np.ndarray[Any, Any]
MISSING_ROW = 0


def splitmix64(value_N: Array) -> Array:
    """Mix the bits of values with the finalizer of splitmix64: uint64 (N,) to uint64 (N,).

    Part of the stored format: never change it.
    """
    mixed_N = value_N + np.uint64(0x9E3779B97F4A7C15)
    shifted_N = mixed_N >> np.uint64(30)
    mixed_N = (mixed_N ^ shifted_N) * np.uint64(0xBF58476D1CE4E5B9)
    shifted_N = mixed_N >> np.uint64(27)
    mixed_N = (mixed_N ^ shifted_N) * np.uint64(0x94D049BB133111EB)
    shifted_N = mixed_N >> np.uint64(31)
    return np.asarray(mixed_N ^ shifted_N)


def salt(table: str) -> np.uint64:
    """A number that gives equal values of different tables different hashes."""
    checksum = zlib.crc32(table.encode())
    return np.uint64(checksum * 0x9E3779B1)


def hash_rows(
    values: pa.Array,
    table: str,
    rows: int,
    watch: Watch | None = None,
) -> Array:
    """Hash raw values into rows 1..rows-1 of a table: int32 (N,).

    Args:
        values: text, integers, numbers or booleans, without nulls.
        table: name of the table.
        rows: rows of the table.
        watch: receives the hashed values.
    """
    if is_text(values.type):
        return _hash_text(values, table, rows, watch)
    id_N, row_N = _spread(_bits(values), table, rows)
    if watch:
        watch(table, id_N, row_N, 1)
    return row_N


def _hash_text(
    values: pa.Array,
    table: str,
    rows: int,
    watch: Watch | None,
) -> Array:
    """Hash each distinct text once."""
    encoded = values.dictionary_encode()
    text_U = encoded.dictionary.to_numpy(zero_copy_only=False)
    hash_U = np.empty(0, np.uint64)
    if len(text_U):
        hash_U = pd.util.hash_array(text_U, categorize=False)
    id_U, row_U = _spread(hash_U, table, rows)

    index_N = encoded.indices.to_numpy()
    if watch:
        count_U = np.bincount(index_N, minlength=len(id_U))
        watch(table, id_U, row_U, count_U)
    return np.asarray(row_U[index_N])


def _bits(values: pa.Array) -> Array:
    """uint64 (N,): the bits of integers, numbers or booleans."""
    types = pa.types
    if types.is_floating(values.type):
        number_N = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        normal_N = number_N + 0.0  # makes -0 and 0 one value
        return np.asarray(normal_N.view(np.uint64))
    if types.is_uint64(values.type):
        return np.asarray(values.to_numpy(zero_copy_only=False))
    integer_N = values.cast(pa.int64()).to_numpy(zero_copy_only=False)
    return np.asarray(integer_N.view(np.uint64))


def _spread(
    bits_N: Array,
    table: str,
    rows: int,
) -> tuple[Array, Array]:
    """Ids, uint64 (N,), and the rows on which they fall, int32 (N,)."""
    id_N = splitmix64(bits_N ^ salt(table))
    usable_rows = np.uint64(rows - 1)  # all but row 0
    remainder_N = id_N % usable_rows
    row_N = remainder_N + np.uint64(1)
    return id_N, row_N.astype(np.int32)


def index_rows(
    values: pa.Array,
    feature: SparseFeature,
    source: str,
) -> Array:
    """Rows v + 1 of integers v in [0, rows - 1): int32 (N,).

    Raises:
        UserError: names the first value outside the table.
    """
    try:
        id_N = values.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{source}: column '{feature.name}' is declared `encoding: index` but is no integer "
            f"({error}); use `encoding: hash`"
        ) from None
    end = feature.rows - 1
    outside_N = (id_N < 0) | (id_N >= end)
    if outside_N.any():
        first = id_N[outside_N][0]
        raise UserError(
            f"{source}: column '{feature.name}' has the value {first}, outside [0, {end}) of its "
            f"table of {feature.rows} rows; raise `rows` or use `encoding: hash`"
        )
    return np.asarray(id_N + 1, np.int32)


def encode_values(
    values: pa.Array,
    feature: SparseFeature,
    source: str,
    watch: Watch | None = None,
) -> Array:
    """Table rows of one value per entry: int32 (N,), row 0 for missing values.

    Args:
        values: raw values.
        feature: the feature that they are of.
        source: names the data in an error.
        watch: receives the hashed values.
    """
    plain = _without_dictionary(values)
    row_N = np.full(len(plain), MISSING_ROW, np.int32)
    if pa.types.is_null(plain.type):
        return row_N
    present = plain.drop_null() if plain.null_count else plain
    if feature.encoding is Encoding.INDEX:
        present_rows = index_rows(present, feature, source)
    else:
        table = feature.table or feature.name
        present_rows = hash_rows(present, table, feature.rows, watch)
    if not plain.null_count:
        return present_rows
    valid_N = plain.is_valid().to_numpy(zero_copy_only=False)
    row_N[valid_N] = present_rows
    return row_N


def _without_dictionary(values: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        return values.dictionary_decode()
    return values


def encode_bag(
    values: pa.Array,
    feature: SparseFeature,
    source: str,
    watch: Watch | None = None,
) -> pa.Array:
    """Lists of raw values as list<int32> of table rows.

    Missing entries are left out, and only the last `max_length` entries of a list are kept.

    Args:
        values: N lists.
        feature: the feature that they are of.
        source: names the data in an error.
        watch: receives the hashed values.
    """
    if pa.types.is_large_list(values.type):
        values = values.cast(pa.list_(values.type.value_type))
    raw_length = pc.fill_null(pc.list_value_length(values), 0)
    raw_length_N = raw_length.to_numpy(zero_copy_only=False).astype(np.int64)
    lists = len(raw_length_N)
    rows = encode_values(values.flatten(), feature, source, watch)

    present = rows != MISSING_ROW
    owner = np.repeat(np.arange(lists), raw_length_N)[present]
    rows = rows[present]
    length_N = np.bincount(owner, minlength=lists)
    end_N = np.cumsum(length_N)
    from_end = end_N[owner] - np.arange(len(rows))
    recent = rows[from_end <= feature.max_length]

    kept_N = np.minimum(length_N, feature.max_length)
    offsets = np.concatenate([[0], np.cumsum(kept_N)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(recent, pa.int32()))


def encode_domains(
    values: pa.Array,
    schema: Schema,
    source: str,
) -> Array:
    """Positions in `schema.domains`: int32 (N,).

    Raises:
        UserError: names a domain that is not in the schema.
    """
    names = _without_dictionary(values).cast(pa.string())
    known = pa.array(schema.domains, pa.string())
    positions = pc.index_in(names, value_set=known)
    if positions.null_count:
        unknown_N = pc.is_null(positions)
        unknown = names.filter(unknown_N)[0].as_py()
        known_names = ", ".join(schema.domains)
        suggestion = nearest(unknown or "", schema.domains)
        raise UserError(
            f"{source}: column 'domain' has the value {unknown!r}; the schema knows "
            f"{known_names}.{suggestion} Add it to `domains` or correct the data."
        )
    position_N = positions.to_numpy(zero_copy_only=False)
    return np.asarray(position_N).astype(np.int32)


def encode_labels(
    values: pa.Array,
    task: str,
    source: str,
) -> Array:
    """Labels 0 or 1: float32 (N,). Raises UserError with any other value."""
    try:
        number_N = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{source}: label column '{task}' is no number ({error}); labels are 0 or 1"
        ) from None
    wrong_N = (number_N != 0) & (number_N != 1)
    if wrong_N.any():
        value = values.filter(pa.array(wrong_N))[0].as_py()
        words = "no value" if value is None else f"the value {value}"
        raise UserError(
            f"{source}: label column '{task}' has {words}; labels must be 0 or 1: "
            "correct the data or leave such events out"
        )
    return np.asarray(number_N, np.float32)


def encode_dense(
    values: pa.Array,
    transform: str,
    name: str,
    source: str,
) -> Array:
    """Numbers after their transform, not yet normalized: float64 (N,).

    Values that are missing or not finite become NaN.
    """
    try:
        number_N = np.array(values.cast(pa.float64()).to_numpy(zero_copy_only=False))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"{source}: dense column '{name}' is no number ({error}); correct the data or declare "
            "it under `features`"
        ) from None
    if transform == "log1p":
        magnitude_N = np.log1p(np.abs(number_N))
        number_N = np.sign(number_N) * magnitude_N
    finite_N = np.isfinite(number_N)
    number_N[~finite_N] = np.nan
    return number_N
