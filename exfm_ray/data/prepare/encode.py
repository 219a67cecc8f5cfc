"""From raw values to table rows: stable hashing, checked indices, labels and domains. No loop over
rows anywhere."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from exfm_ray.data.prepare.hash_collisions import Watch
from exfm_ray.errors import UserError, nearest
from exfm_ray.schema import Encoding, Schema, SparseFeature

Array = np.ndarray[Any, Any]
MISSING_ROW = 0


def splitmix64(values: Array) -> Array:
    """The splitmix64 finaliser: uint64 (N,) to well mixed uint64 (N,). Part of the stored format:
    never change it."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def salt(table: str) -> np.uint64:
    """What keeps equal values of different tables apart."""
    return np.uint64(zlib.crc32(table.encode()) * 0x9E3779B1)


def hash_rows(
    values: pa.Array,
    table: str,
    rows: int,
    watch: Watch | None = None,
) -> Array:
    """Rows 1..rows-1 of the raw `values` (text, integers, numbers, booleans) without nulls: int32
    (N,). `watch` is told of them."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        encoded = values.dictionary_encode()
        text = encoded.dictionary.to_numpy(zero_copy_only=False)
        hashed_U = (
            pd.util.hash_array(text, categorize=False) if len(text) else np.empty(0, np.uint64)
        )
        index_N = encoded.indices.to_numpy()
        id_U, row_U = _spread(hashed_U, table, rows)
        if watch:
            watch(table, id_U, row_U, np.bincount(index_N, minlength=len(id_U)))
        return np.asarray(row_U[index_N])
    if pa.types.is_floating(values.type):
        bits_N = (values.cast(pa.float64()).to_numpy(zero_copy_only=False) + 0.0).view(
            np.uint64
        )  # + 0.0 makes -0 and 0 one value
    elif pa.types.is_uint64(values.type):
        bits_N = values.to_numpy(zero_copy_only=False)
    else:
        bits_N = values.cast(pa.int64()).to_numpy(zero_copy_only=False).view(np.uint64)
    id_N, row_N = _spread(bits_N, table, rows)
    if watch:
        watch(table, id_N, row_N, 1)
    return row_N


def _spread(
    bits: Array,
    table: str,
    rows: int,
) -> tuple[Array, Array]:
    """Ids, uint64, and the rows that they fall on, int32."""
    ids = splitmix64(bits ^ salt(table))
    return ids, (ids % np.uint64(rows - 1) + np.uint64(1)).astype(np.int32)


def index_rows(
    values: pa.Array,
    feature: SparseFeature,
    source: str,
) -> Array:
    """Rows v + 1 of integers v in [0, rows - 1): int32 (N,). UserError names the first value
    outside."""
    try:
        ids = values.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{source}: column '{feature.name}' is declared `encoding: index` but is no integer ({error}); use `encoding: hash`"
        ) from None
    outside = (ids < 0) | (ids >= feature.rows - 1)
    if outside.any():
        raise UserError(
            f"{source}: column '{feature.name}' has the value {ids[outside][0]}, outside [0, {feature.rows - 1}) of its table of "
            f"{feature.rows} rows; raise `rows` or use `encoding: hash`"
        )
    return np.asarray(ids + 1, np.int32)


def encode_values(
    values: pa.Array,
    feature: SparseFeature,
    source: str,
    watch: Watch | None = None,
) -> Array:
    """Table rows of one value per entry: int32 (N,), row 0 where the value is missing. `watch` is
    told of hashed values."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_null(values.type):
        return np.zeros(len(values), np.int32)
    present = values.drop_null() if values.null_count else values
    if feature.encoding is Encoding.INDEX:
        rows = index_rows(present, feature, source)
    else:
        rows = hash_rows(present, feature.table or feature.name, feature.rows, watch)
    if not values.null_count:
        return rows
    out = np.zeros(len(values), np.int32)
    out[values.is_valid().to_numpy(zero_copy_only=False)] = rows
    return out


def encode_bag(
    values: pa.Array,
    feature: SparseFeature,
    source: str,
    watch: Watch | None = None,
) -> pa.Array:
    """A list column (N lists) as list<int32> of table rows: missing entries left out, the last
    `max_length` kept."""
    if pa.types.is_large_list(values.type):
        values = values.cast(pa.list_(values.type.value_type))
    lengths = (
        pc.fill_null(pc.list_value_length(values), 0)
        .to_numpy(zero_copy_only=False)
        .astype(np.int64)
    )
    rows = encode_values(values.flatten(), feature, source, watch)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    owner = owner[rows != MISSING_ROW]
    rows = rows[rows != MISSING_ROW]
    lengths = np.bincount(owner, minlength=len(lengths))
    ends = np.cumsum(lengths)
    recent = ends[owner] - np.arange(len(rows)) <= feature.max_length
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, feature.max_length))]).astype(
        np.int32
    )
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows[recent], pa.int32()))


def encode_domains(
    values: pa.Array,
    schema: Schema,
    source: str,
) -> Array:
    """Positions in `schema.domains`: int32 (N,). UserError names a domain that the schema does not
    know."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    names = values.cast(pa.string())
    found = pc.index_in(names, value_set=pa.array(schema.domains, pa.string()))
    if found.null_count:
        unknown = names.filter(pc.is_null(found))[0].as_py()
        raise UserError(
            f"{source}: column 'domain' has the value {unknown!r}; the schema knows {', '.join(schema.domains)}."
            + nearest(unknown or "", schema.domains)
            + " Add it to `domains` or correct the data."
        )
    return np.asarray(found.to_numpy(zero_copy_only=False)).astype(np.int32)


def encode_labels(
    values: pa.Array,
    task: str,
    source: str,
) -> Array:
    """Labels 0 or 1: float32 (N,). UserError names any other value."""
    try:
        numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{source}: label column '{task}' is no number ({error}); labels are 0 or 1"
        ) from None
    wrong = (numbers != 0) & (numbers != 1)
    if wrong.any():
        value = values.filter(pa.array(wrong))[0].as_py()
        shown = "no value" if value is None else f"the value {value}"
        raise UserError(
            f"{source}: label column '{task}' has {shown}; labels must be 0 or 1: correct the data or leave such events out"
        )
    return np.asarray(numbers, np.float32)


def encode_dense(
    values: pa.Array,
    transform: str,
    name: str,
    source: str,
) -> Array:
    """Numbers after their transform, not yet normalised: float64 (N,), NaN where missing or not
    finite."""
    try:
        numbers = np.array(values.cast(pa.float64()).to_numpy(zero_copy_only=False))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"{source}: dense column '{name}' is no number ({error}); correct the data or declare it under `features`"
        ) from None
    if transform == "log1p":
        numbers = np.sign(numbers) * np.log1p(np.abs(numbers))
    numbers[~np.isfinite(numbers)] = np.nan
    return numbers
