"""From raw rows to packed columns: the one path that every raw source takes."""

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
    """Encoded events, in event order: N events, S single-valued features, D dense features, T
    tasks.

    `dense_ND` is transformed, not normalised: that depends on the window. `repeated_N` marks
    repetitions of earlier events. `known_NT`: ms at which each label became known, int64.
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

    def take(self, chosen: Array | slice) -> Self:
        """The events that a boolean mask, positions or a slice choose."""
        if isinstance(chosen, slice):
            bags = {n: b[chosen] for n, b in self.bags.items()}
        elif chosen.dtype != bool:
            bags = {n: b.take(pa.array(chosen)) for n, b in self.bags.items()}
        else:
            bags = {n: b.filter(pa.array(chosen)) for n, b in self.bags.items()}
        arrays = {n: a[chosen] for n, a in vars(self).items() if n != "bags"}
        return type(self)(**arrays, bags=bags)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One after the other."""
        bags = {
            name: pa.concat_arrays([part.bags[name] for part in parts]) for name in parts[0].bags
        }
        return cls(
            **{
                n: np.concatenate([vars(part)[n] for part in parts])
                for n in vars(parts[0])
                if n != "bags"
            },
            bags=bags,
        )

    def packed(self, schema: Schema, dense_ND: Array) -> pa.Table:
        """The stream's columns, with `dense_ND` normalised."""
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
        _fixed(labels_NT, pa.float32()),
        _fixed(sparse_NS, pa.int32()),
        *([_fixed(dense_ND, pa.float32())] if schema.dense else []),
        *(bags[bag.name] for bag in schema.bags),
    ]
    return pa.Table.from_arrays(columns, schema=schema.arrow_schema)


def _fixed(values_NW: Array, of: pa.DataType) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(values_NW).reshape(-1), of), values_NW.shape[1]
    )


class Packer:
    """Encodes table after table of a source's raw rows; carries what must outlive a table."""

    def __init__(self, source: RawSource, drop_duplicates: bool) -> None:
        self.source = source
        self.schema = source.schema
        self.collisions = Collisions(source.schema)
        self._drop = drop_duplicates
        self._finder = DuplicateFinder()
        self._history = HistoryBuilder(source.history.length) if source.history else None
        self._read = 0
        self._last_time: int | None = None

    def encode(self, raw: pa.Table) -> Rows:
        """Encode raw rows in event order. Where duplicates are dropped they are marked and still
        there: see `kept`."""
        rows = len(raw)
        times_N = self._times(raw)
        numbers_N = np.arange(self._read, self._read + rows)
        schema = self.schema
        name = self.source.name
        watch = self.collisions.add
        domain_N = (
            encode_domains(_column(raw, "domain"), schema, name)
            if "domain" in raw.column_names
            else np.zeros(rows, np.int32)
        )
        labels = [self._label(raw, task) for task in schema.tasks]
        sparse = [encode_values(_column(raw, f.name), f, name, watch) for f in schema.single[:-1]]
        dense = [
            encode_dense(_column(raw, d.name), d.transform, d.name, name) for d in schema.dense
        ]
        built = self.source.history.feature if self.source.history else None
        bags = {
            f.name: encode_bag(_column(raw, f.name), f, name, watch)
            for f in schema.bags
            if f.name != built
        }
        encoded = Rows(
            example_id_N=self._ids(raw) if "example_id" in raw.column_names else numbers_N,
            times_N=times_N,
            domain_N=domain_N,
            labels_NT=np.stack(labels, axis=1),
            known_NT=np.stack(
                [
                    self._known(raw, task, label_N, times_N)
                    for task, label_N in zip(schema.tasks, labels, strict=True)
                ],
                axis=1,
            ),
            sparse_NS=np.stack([*sparse, domain_N + 1], axis=1).astype(np.int32),
            dense_ND=np.stack(dense, axis=1) if dense else np.zeros((rows, 0)),
            bags=bags,
            repeated_N=np.zeros(rows, bool),
        )
        encoded.repeated_N[:] = self._repeated(raw, encoded)
        if self._history:
            encoded.bags[str(built)] = self._histories(raw, encoded)
        self._read += rows
        return encoded

    def _times(self, raw: pa.Table) -> Array:
        if "event_time" not in raw.column_names:
            return np.arange(self._read, self._read + len(raw))
        column = _column(raw, "event_time")
        if column.null_count:
            raise UserError(
                f"{self.source.name}: event {self._read + _first_null(column)} has no event time; correct the data or leave such events out"
            )
        times_N = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        before_N = np.concatenate(
            [[times_N[0] if self._last_time is None else self._last_time], times_N[:-1]]
        )
        wrong = np.flatnonzero(times_N < before_N)
        if len(wrong):
            i = int(wrong[0])
            raise UserError(
                f"{self.source.name}: events out of order: event {self._read + i} (counted from 0) has time {times_N[i]} ms after one of "
                f"{before_N[i]} ms; sort the data by time, or set `sort: true` in the schema file of a `table` source"
            )
        self._last_time = int(times_N[-1])
        return np.asarray(times_N)

    def _ids(self, raw: pa.Table) -> Array:
        column = _column(raw, "example_id")
        if column.null_count:
            raise UserError(
                f"{self.source.name}: event {self._read + _first_null(column)} has no example id; leave `example_id` out to number the events"
            )
        try:
            return np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False))
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{self.source.name}: example ids must be integers below 2^63 ({error}); leave `example_id` out to number the events"
            ) from None

    def _label(self, raw: pa.Table, task: str) -> Array:
        """float32 (N,): NaN where the labels are no column, but come later."""
        if task not in raw.column_names:
            return np.full(len(raw), np.nan, np.float32)
        return encode_labels(_column(raw, task), task, self.source.name)

    def _known(
        self,
        raw: pa.Table,
        task: str,
        label_N: Array,
        times_N: Array,
    ) -> Array:
        """When each label became known, ms; with its event where the source says nothing else."""
        if task not in self.source.label_time_tasks:
            return times_N
        column = _column(raw, f"known:{task}")
        lacking = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False) & (label_N == 1))
        if len(lacking):
            raise UserError(
                f"{self.source.name}: event {self._read + lacking[0]} has label 1 for '{task}' but no time at which it became known"
            )
        return np.asarray(column.fill_null(0).cast(pa.int64()).to_numpy(zero_copy_only=False))

    def _repeated(self, raw: pa.Table, rows: Rows) -> Array:
        """An event with an id of its own is known by it; another one by all that it says."""
        if self.source.ordered_only:
            return np.zeros(len(rows), bool)
        hashes = np.zeros(len(rows), np.uint64)
        if "event_key" in raw.column_names:
            hashes = fold(hashes, _column(raw, "event_key").to_numpy(zero_copy_only=False))
        elif "example_id" in raw.column_names:
            hashes = fold(hashes, rows.example_id_N)
        else:
            for column in (*rows.sparse_NS.T, *rows.labels_NT.T):
                hashes = fold(hashes, column.astype(np.int64))
            for column in rows.dense_ND.T:
                hashes = fold(hashes, column)
            for bag in rows.bags.values():
                hashes = fold_bag(hashes, bag)
        return self._finder.repeated(rows.times_N, hashes)

    def _histories(self, raw: pa.Table, rows: Rows) -> pa.Array:
        """The sequence feature. A repetition that will be dropped does not enter anyone's
        history."""
        spec = self.source.history
        builder = self._history
        assert spec and builder
        users_N, items_N = (
            _column(raw, c).fill_null(-1).cast(pa.int64()).to_numpy(zero_copy_only=False)
            for c in (spec.user, spec.item)
        )
        acted_N = rows.labels_NT[:, self.schema.tasks.index(spec.label)] == 1
        if self._drop:
            acted_N = acted_N & ~rows.repeated_N
        feature = next(f for f in self.schema.bags if f.name == spec.feature)
        return encode_bag(
            builder.extend(users_N, rows.times_N, items_N, acted_N),
            feature,
            self.source.name,
            self.collisions.add,
        )

    def kept(self, rows: Rows) -> Array:
        """Which rows go into the stream: bool (N,)."""
        return ~rows.repeated_N if self._drop else np.ones(len(rows), bool)


def _column(raw: pa.Table, name: str) -> pa.Array:
    column = raw[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _first_null(column: pa.Array) -> int:
    return int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
