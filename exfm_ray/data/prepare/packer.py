"""From raw rows to packed columns: the one path that every raw source takes.

Shapes: N events, S single-valued features, D dense features, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa

from exfm_ray.data.prepare.duplicates import DuplicateFinder, fold, fold_bag
from exfm_ray.data.prepare.encode import (
    encode_bag,
    encode_dense,
    encode_domains,
    encode_labels,
    encode_values,
)
from exfm_ray.data.prepare.hash_collisions import Collisions
from exfm_ray.data.prepare.sequence_feature import HistoryBuilder
from exfm_ray.data.sources.base import RawSource
from exfm_ray.errors import UserError
from exfm_ray.schema import Schema

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Rows:
    """Encoded events, in event order.

    Attributes:
        example_id_N: int64.
        times_N: int64, ms.
        domain_N: int32, positions in the schema's domains.
        labels_NT: float32, 0 or 1; NaN for labels that come later.
        known_NT: int64, ms at which each label became known.
        sparse_NS: int32, table rows.
        dense_ND: float64, transformed and not normalized, because that depends on the window.
        bags: list<int32> by feature, table rows.
        repeated_N: bool, repetitions of earlier events.
    """

    example_id_N: Array
    times_N: Array
    domain_N: Array
    labels_NT: Array
    known_NT: Array
    sparse_NS: Array
    dense_ND: Array
    bags: dict[str, pa.Array]
    repeated_N: Array

    def __len__(self) -> int:
        return len(self.times_N)

    def take(self, selected: Array | slice) -> Self:
        """The events that a boolean mask, positions or a slice select."""
        bags = {name: _take(bag, selected) for name, bag in self.bags.items()}
        arrays = {name: array[selected] for name, array in self._arrays().items()}
        return type(self)(**arrays, bags=bags)

    def _arrays(self) -> dict[str, Array]:
        """All fields but the bags."""
        fields = dict(vars(self))
        del fields["bags"]
        return fields

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The events of all parts, one part after the other."""
        first = parts[0]
        bags = {}
        for name in first.bags:
            columns = [part.bags[name] for part in parts]
            bags[name] = pa.concat_arrays(columns)
        arrays = {}
        for name in first._arrays():
            pieces = [getattr(part, name) for part in parts]
            arrays[name] = np.concatenate(pieces)
        return cls(**arrays, bags=bags)

    def packed(self, schema: Schema, dense_ND: Array) -> pa.Table:
        """The stream's columns.

        Args:
            schema: the stream's schema.
            dense_ND: float32, the normalized dense features.
        """
        return packed(
            schema,
            self.example_id_N,
            self.times_N,
            self.domain_N,
            self.labels_NT,
            self.sparse_NS,
            dense_ND,
            self.bags,
        )


def _take(bag: pa.Array, selected: Array | slice) -> pa.Array:
    if isinstance(selected, slice):
        return bag[selected]
    arrow = pa.array(selected)
    if selected.dtype == bool:
        return bag.filter(arrow)
    return bag.take(arrow)


def packed(
    schema: Schema,
    example_id_N: Array,
    times_N: Array,
    domain_N: Array,
    labels_NT: Array,
    sparse_NS: Array,
    dense_ND: Array,
    bags: dict[str, pa.Array],
) -> pa.Table:
    """A table with the columns of `schema.arrow_schema`."""
    columns = [
        pa.array(example_id_N, pa.int64()),
        pa.array(times_N, pa.int64()),
        pa.array(domain_N, pa.int32()),
        _fixed_lists(labels_NT, pa.float32()),
        _fixed_lists(sparse_NS, pa.int32()),
    ]
    if schema.dense:
        columns.append(_fixed_lists(dense_ND, pa.float32()))
    for bag in schema.bags:
        columns.append(bags[bag.name])
    return pa.Table.from_arrays(columns, schema=schema.arrow_schema)


def _fixed_lists(values_NW: Array, of: pa.DataType) -> pa.FixedSizeListArray:
    width = values_NW.shape[1]
    flat = np.ascontiguousarray(values_NW).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, of), width)


class Packer:
    """Encodes table after table of a source's raw rows, with the state that outlives a table."""

    def __init__(self, source: RawSource, drop_duplicates: bool) -> None:
        """Start before the first table.

        Args:
            source: the raw source.
            drop_duplicates: repetitions do not enter histories and are not `kept`.
        """
        self.source = source
        self.schema = source.schema
        self.collisions = Collisions(source.schema)
        self._drop = drop_duplicates
        self._finder = DuplicateFinder()
        self._history: HistoryBuilder | None = None
        if source.history:
            self._history = HistoryBuilder(source.history.length)
        self._read = 0
        self._last_time: int | None = None

    def encode(self, raw: pa.Table) -> Rows:
        """Encode raw rows in event order.

        Repetitions are marked and stay among the rows, even if they will be dropped: see `kept`.
        """
        rows = len(raw)
        times_N = self._times(raw)
        domain_N = self._domains(raw)
        labels_NT = self._labels(raw)
        encoded = Rows(
            example_id_N=self._ids(raw),
            times_N=times_N,
            domain_N=domain_N,
            labels_NT=labels_NT,
            sparse_NS=self._sparse(raw, domain_N),
            dense_ND=self._dense(raw),
            bags=self._bags(raw),
            known_NT=self._known(raw, labels_NT, times_N),
            repeated_N=np.zeros(rows, bool),
        )
        encoded.repeated_N[:] = self._repeated(raw, encoded)
        if self.source.history:
            feature = self.source.history.feature
            encoded.bags[feature] = self._histories(raw, encoded)
        self._read += rows
        return encoded

    def _numbers(self, raw: pa.Table) -> Array:
        """int64 (N,): running numbers of the events."""
        end = self._read + len(raw)
        return np.arange(self._read, end)

    def _times(self, raw: pa.Table) -> Array:
        """int64 (N,): event times in ms; running numbers if there are none."""
        if "event_time" not in raw.column_names:
            return self._numbers(raw)
        column = _column(raw, "event_time")
        if column.null_count:
            number = self._read + _first_null(column)
            raise UserError(
                f"{self.source.name}: event {number} has no event time; "
                "correct the data or leave such events out"
            )
        times_N = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        self._check_order(times_N)
        self._last_time = int(times_N[-1])
        return np.asarray(times_N)

    def _check_order(self, times_N: Array) -> None:
        """Raise UserError if a time is before the time of the event before it."""
        previous = times_N[0] if self._last_time is None else self._last_time
        before_N = np.concatenate([[previous], times_N[:-1]])
        wrong = np.flatnonzero(times_N < before_N)
        if not len(wrong):
            return
        first = int(wrong[0])
        number = self._read + first
        time_ms = times_N[first]
        before_ms = before_N[first]
        raise UserError(
            f"{self.source.name}: events out of order: event {number} (counted from 0) has time "
            f"{time_ms} ms after one of {before_ms} ms; sort the data by time, or set "
            "`sort: true` in the schema file of a `table` source"
        )

    def _ids(self, raw: pa.Table) -> Array:
        """int64 (N,): example ids; running numbers if there are none."""
        if "example_id" not in raw.column_names:
            return self._numbers(raw)
        column = _column(raw, "example_id")
        name = self.source.name
        way_out = "leave `example_id` out to number the events"
        if column.null_count:
            number = self._read + _first_null(column)
            raise UserError(f"{name}: event {number} has no example id; {way_out}")
        try:
            integers = column.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{name}: example ids must be integers below 2^63 ({error}); {way_out}"
            ) from None
        ids_N = integers.to_numpy(zero_copy_only=False)
        return np.asarray(ids_N)

    def _domains(self, raw: pa.Table) -> Array:
        """int32 (N,): positions in the schema's domains."""
        if "domain" not in raw.column_names:
            rows = len(raw)
            return np.zeros(rows, np.int32)
        name = self.source.name
        column = _column(raw, "domain")
        return encode_domains(column, self.schema, name)

    def _labels(self, raw: pa.Table) -> Array:
        """float32 (N, T): NaN for tasks without a column, whose labels come later."""
        rows = len(raw)
        columns = []
        for task in self.schema.tasks:
            if task in raw.column_names:
                values = _column(raw, task)
                label_N = encode_labels(values, task, self.source.name)
            else:
                label_N = np.full(rows, np.nan, np.float32)
            columns.append(label_N)
        return np.stack(columns, axis=1)

    def _sparse(self, raw: pa.Table, domain_N: Array) -> Array:
        """int32 (N, S): table rows of the single-valued features, the domain last."""
        columns = []
        for feature in self.schema.single[:-1]:
            values = _column(raw, feature.name)
            row_N = encode_values(values, feature, self.source.name, self.collisions.add)
            columns.append(row_N)
        columns.append(domain_N + 1)
        return np.stack(columns, axis=1).astype(np.int32)

    def _dense(self, raw: pa.Table) -> Array:
        """float64 (N, D): transformed dense features."""
        columns = []
        for feature in self.schema.dense:
            name = feature.name
            values = _column(raw, name)
            number_N = encode_dense(values, feature.transform, name, self.source.name)
            columns.append(number_N)
        if not columns:
            rows = len(raw)
            return np.zeros((rows, 0))
        return np.stack(columns, axis=1)

    def _bags(self, raw: pa.Table) -> dict[str, pa.Array]:
        """Table rows of the multi-valued and sequence features that are columns."""
        history = self.source.history
        bags = {}
        for feature in self.schema.bags:
            if history and feature.name == history.feature:
                continue
            values = _column(raw, feature.name)
            bags[feature.name] = encode_bag(values, feature, self.source.name, self.collisions.add)
        return bags

    def _known(
        self,
        raw: pa.Table,
        labels_NT: Array,
        times_N: Array,
    ) -> Array:
        """int64 (N, T): when each label became known, ms; with its event by default."""
        columns = []
        for column, task in enumerate(self.schema.tasks):
            known_N = times_N
            if task in self.source.label_time_tasks:
                known_N = self._label_times(raw, task, labels_NT[:, column])
            columns.append(known_N)
        return np.stack(columns, axis=1)

    def _label_times(
        self,
        raw: pa.Table,
        task: str,
        label_N: Array,
    ) -> Array:
        """int64 (N,): when each label of a task became known, ms; 0 for a label of 0 without a
        time."""
        column = _column(raw, f"known:{task}")
        null_N = column.is_null().to_numpy(zero_copy_only=False)
        missing = np.flatnonzero(null_N & (label_N == 1))
        if len(missing):
            number = self._read + missing[0]
            raise UserError(
                f"{self.source.name}: event {number} has label 1 for '{task}' but no time at "
                "which it became known"
            )
        known = column.fill_null(0).cast(pa.int64())
        return np.asarray(known.to_numpy(zero_copy_only=False))

    def _repeated(self, raw: pa.Table, rows: Rows) -> Array:
        """Which events are repetitions: bool (N,).

        An event with an id or key is identified by it, another one by its domain, features and
        labels.
        """
        count = len(rows)
        if self.source.ordered_only:
            return np.zeros(count, bool)
        hash_N = np.zeros(count, np.uint64)
        if "event_key" in raw.column_names:
            key = _column(raw, "event_key")
            key_N = key.to_numpy(zero_copy_only=False)
            hash_N = fold(hash_N, key_N)
        elif "example_id" in raw.column_names:
            hash_N = fold(hash_N, rows.example_id_N)
        else:
            hash_N = _fold_content(hash_N, rows)
        return self._finder.repeated(rows.times_N, hash_N)

    def _histories(self, raw: pa.Table, rows: Rows) -> pa.Array:
        """The sequence feature.

        A repetition that will be dropped does not enter any history.
        """
        spec = self.source.history
        assert spec and self._history
        task = self.schema.task_index(spec.label)
        acted_N = rows.labels_NT[:, task] == 1
        if self._drop:
            acted_N = acted_N & ~rows.repeated_N
        users_N = _integers(raw, spec.user)
        items_N = _integers(raw, spec.item)
        items = self._history.extend(users_N, rows.times_N, items_N, acted_N)
        feature = next(bag for bag in self.schema.bags if bag.name == spec.feature)
        return encode_bag(items, feature, self.source.name, self.collisions.add)

    def kept(self, rows: Rows) -> Array:
        """Which rows go into the stream: bool (N,)."""
        if self._drop:
            return ~rows.repeated_N
        return np.ones(len(rows), bool)


def _fold_content(hash_N: Array, rows: Rows) -> Array:
    """Fold the content of events into the row hashes: uint64 (N,)."""
    for column_N in (*rows.sparse_NS.T, *rows.labels_NT.T):
        integer_N = column_N.astype(np.int64)
        hash_N = fold(hash_N, integer_N)
    for column_N in rows.dense_ND.T:
        hash_N = fold(hash_N, column_N)
    for bag in rows.bags.values():
        hash_N = fold_bag(hash_N, bag)
    return hash_N


def _column(raw: pa.Table, name: str) -> pa.Array:
    column = raw[name]
    if column.num_chunks == 1:
        return column.chunk(0)
    return column.combine_chunks()


def _integers(raw: pa.Table, name: str) -> Array:
    """int64 (N,): a column of integers, -1 for missing ones."""
    filled = _column(raw, name).fill_null(-1)
    integers = filled.cast(pa.int64())
    return np.asarray(integers.to_numpy(zero_copy_only=False))


def _first_null(column: pa.Array) -> int:
    null_N = column.is_null().to_numpy(zero_copy_only=False)
    return int(np.argmax(null_N))
