"""What an example is: sparse, multi-valued and sequence features, dense features, labels, domain,
event time, id.

A stream stores an example in packed columns (see `arrow_schema`), in which ids are table rows
already:

    example_id   int64                     unique in the stream
    event_time   int64                     milliseconds since the epoch, not decreasing
    domain       int32                     position in `Schema.domains`
    labels       fixed_size_list<float>[T] 0 or 1, in the order of `Schema.tasks`
    sparse       fixed_size_list<int32>[S] one table row per single-valued feature, in the order of `Schema.single`
    dense        fixed_size_list<float>[D] normalised, in the order of `Schema.dense`; absent where there are none
    <feature>    list<int32>               one such column for every multi-valued and every sequence feature

Row 0 of every table stands for a missing value. The domain is a single-valued feature too
(`DOMAIN_FEATURE`, the last one), so that a model over several domains can tell them apart.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property
from typing import Self

import pyarrow as pa
from pydantic import Field, model_validator

from exfm_ray.base import FrozenModel, Name
from exfm_ray.errors import nearest
from exfm_ray.storage.atomic import short_hash

DOMAIN_FEATURE = "domain"
ALL_DOMAINS = "all"
"""The domain of a stream without domains; where there are several, the name of them together in
metrics."""

PACKED_COLUMNS = ("example_id", "event_time", "domain", "labels", "sparse", "dense")


class Kind(StrEnum):
    """How many values a sparse feature has in one example."""

    SINGLE = "single"
    MULTI = "multi"
    SEQUENCE = "sequence"


class Encoding(StrEnum):
    """How a raw value becomes a table row: `hash` takes any value; `index` takes integers v in [0,
    rows - 1) as v + 1."""

    HASH = "hash"
    INDEX = "index"


class SparseFeature(FrozenModel):
    """A categorical feature and the embedding table that it reads."""

    name: Name
    kind: Kind = Kind.SINGLE
    encoding: Encoding = Encoding.HASH
    rows: int = Field(ge=2, le=2**31 - 1, description="rows of the table, row 0 (missing) included")
    table: Name | None = Field(None, description="another feature whose table this one shares")
    max_length: int = Field(
        1,
        ge=1,
        description="most values kept of a multi-valued or sequence feature (the last ones)",
    )


class DenseFeature(FrozenModel):
    """A number. `log1p` compresses counts (sign(x) log(1 + |x|)) before the normalisation."""

    name: Name
    transform: str = Field("none", pattern="^(none|log1p)$")


class Schema(FrozenModel):
    """The features, tasks and domains of a stream."""

    features: tuple[SparseFeature, ...]
    dense: tuple[DenseFeature, ...] = ()
    tasks: tuple[Name, ...] = Field(min_length=1)
    domains: tuple[Name, ...] = Field((ALL_DOMAINS,), min_length=1)
    group_by: Name | None = Field(
        None, description="the single-valued feature by which AUC is grouped (the user)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [f.name for f in self.features] + [d.name for d in self.dense]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"feature '{name}' is declared twice")
            if name in PACKED_COLUMNS:
                raise ValueError(f"feature '{name}' has the name of a packed column; rename it")
        if ALL_DOMAINS in self.domains and len(self.domains) > 1:
            raise ValueError(
                f"domain '{ALL_DOMAINS}' has the name of all domains together; rename it"
            )
        by_name = {f.name: f for f in self.features}
        for feature in self.features:
            owner = by_name.get(feature.table) if feature.table else feature
            if owner is None or (owner.table and owner is not feature):
                raise ValueError(
                    f"feature '{feature.name}' shares the table of '{feature.table}', which owns none."
                    + nearest(feature.table or "", by_name)
                )
            if (owner.rows, owner.encoding) != (feature.rows, feature.encoding):
                raise ValueError(
                    f"feature '{feature.name}' and '{owner.name}' share a table: give both the same rows and encoding"
                )
        if self.group_by and self.group_by not in [
            f.name for f in self.features if f.kind is Kind.SINGLE
        ]:
            raise ValueError(
                f"group_by names '{self.group_by}', which is no single-valued feature."
                + nearest(self.group_by, by_name)
            )
        return self

    @cached_property
    def single(self) -> tuple[SparseFeature, ...]:
        """Single-valued features in the order of the packed `sparse` column, the domain last."""
        domain = SparseFeature(
            name=DOMAIN_FEATURE, encoding=Encoding.INDEX, rows=len(self.domains) + 1
        )
        return (*(f for f in self.features if f.kind is Kind.SINGLE), domain)

    @cached_property
    def bags(self) -> tuple[SparseFeature, ...]:
        """Multi-valued and sequence features, each a list column of its own."""
        return tuple(f for f in self.features if f.kind is not Kind.SINGLE)

    @cached_property
    def tables(self) -> dict[str, int]:
        """Embedding tables: name to number of rows."""
        return {f.name: f.rows for f in (*self.single, *self.bags) if f.table is None}

    @cached_property
    def digest(self) -> str:
        """Names this schema: two streams, a snapshot and a stream fit together when their digests
        are equal."""
        return short_hash(self.model_dump(mode="json"))

    def difference(self, other: Schema) -> str:
        """What of this schema another one lacks or has otherwise, in words, where their digests
        differ."""
        theirs = {feature.name: feature for feature in (*other.single, *other.bags)}
        for own in (*self.single, *self.bags):
            found = theirs.get(own.name)
            if found is None:
                return f"it has no feature '{own.name}'"
            if (found.encoding, found.rows, found.table) != (own.encoding, own.rows, own.table):
                ways = (
                    f"{f.encoding} into {f.rows} rows of table '{f.table or f.name}'"
                    for f in (found, own)
                )
                return f"it numbers the ids of '{own.name}' otherwise ({', here '.join(ways)})"
        return "its lists of features, dense features, tasks or domains are others"

    def domain_index(self, name: str) -> int:
        """Position of a domain; ValueError with the nearest name for an unknown one."""
        if name not in self.domains:
            raise ValueError(
                f"unknown domain '{name}': the stream has {', '.join(self.domains)}."
                + nearest(name, self.domains)
            )
        return self.domains.index(name)

    def task_index(self, name: str) -> int:
        """Position of a task; ValueError with the nearest name for an unknown one."""
        if name not in self.tasks:
            raise ValueError(
                f"unknown task '{name}': the stream has {', '.join(self.tasks)}."
                + nearest(name, self.tasks)
            )
        return self.tasks.index(name)

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """The packed columns of a fragment."""
        fields = [
            pa.field("example_id", pa.int64()),
            pa.field("event_time", pa.int64()),
            pa.field("domain", pa.int32()),
            pa.field("labels", pa.list_(pa.float32(), len(self.tasks))),
            pa.field("sparse", pa.list_(pa.int32(), len(self.single))),
        ]
        if self.dense:  # Parquet cannot hold lists of width 0
            fields.append(pa.field("dense", pa.list_(pa.float32(), len(self.dense))))
        return pa.schema(fields + [pa.field(f.name, pa.list_(pa.int32())) for f in self.bags])
