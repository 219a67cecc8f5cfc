"""The schema of a stream: features, tasks, domains, and the packed columns of an example.

A stream stores an example in packed columns (see `arrow_schema`), in which ids are table rows
already:

    example_id   int64                     unique in the stream
    event_time   int64                     milliseconds since the epoch, not decreasing
    domain       int32                     position in `Schema.domains`
    labels       fixed_size_list<float>[T] 0 or 1, in the order of `Schema.tasks`
    sparse       fixed_size_list<int32>[S] one table row per single-valued feature, in the order of
                                           `Schema.single`
    dense        fixed_size_list<float>[D] normalized, in the order of `Schema.dense`; absent if
                                           there are none
    <feature>    list<int32>               one column per multi-valued and per sequence feature

Row 0 of every table stands for a missing value. The domain is a single-valued feature, too
(`DOMAIN_FEATURE`, the last one), so that a model over several domains can distinguish them.
"""

from __future__ import annotations

from collections.abc import Sequence
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
"""The domain of a stream without domains; with several, the name of all of them in metrics."""

PACKED_COLUMNS = ("example_id", "event_time", "domain", "labels", "sparse", "dense")


class Kind(StrEnum):
    """How many values a sparse feature has in one example."""

    SINGLE = "single"
    MULTI = "multi"
    SEQUENCE = "sequence"


class Encoding(StrEnum):
    """How a raw value becomes a table row.

    `hash` accepts any value; `index` accepts integers v in [0, rows - 1) and maps them to v + 1.
    """

    HASH = "hash"
    INDEX = "index"


class SparseFeature(FrozenModel):
    """A categorical feature and the embedding table that it reads."""

    name: Name = Field(description="Name of the feature, and the raw column that it is read from.")
    kind: Kind = Field(Kind.SINGLE, description="Number of values in an example.")
    encoding: Encoding = Field(Encoding.HASH, description="How a raw value becomes a table row.")
    rows: int = Field(
        ge=2, le=2**31 - 1, description="Rows of the table, including row 0 for a missing value."
    )
    table: Name | None = Field(
        None, description="Feature whose table this one shares; none: a table of its own."
    )
    max_length: int = Field(
        1,
        ge=1,
        description="Values of a multi-valued or sequence feature to keep, the last ones.",
    )


class DenseFeature(FrozenModel):
    """A numeric feature and its transform."""

    name: Name = Field(description="Name of the feature, and the raw column that it is read from.")
    transform: str = Field(
        "none",
        pattern="^(none|log1p)$",
        description="Applied before normalization. log1p compresses counts: sign(x) log(1 + |x|).",
    )


class Schema(FrozenModel):
    """The features, tasks and domains of a stream."""

    features: tuple[SparseFeature, ...] = Field(description="Categorical features.")
    dense: tuple[DenseFeature, ...] = Field((), description="Numeric features.")
    tasks: tuple[Name, ...] = Field(min_length=1, description="Tasks, with labels 0 and 1.")
    domains: tuple[Name, ...] = Field(
        (ALL_DOMAINS,), min_length=1, description="Domains, such as the surfaces of a product."
    )
    group_by: Name | None = Field(
        None, description="Single-valued feature by which AUC is grouped (the user); none: no gAUC."
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [feature.name for feature in self.features]
        names += [feature.name for feature in self.dense]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"feature '{name}' is declared twice")
            if name in PACKED_COLUMNS:
                raise ValueError(f"feature '{name}' has the name of a packed column; rename it")
        if ALL_DOMAINS in self.domains and len(self.domains) > 1:
            raise ValueError(f"domain '{ALL_DOMAINS}' has the name of all domains; rename it")
        return self

    @model_validator(mode="after")
    def _check_tables(self) -> Self:
        by_name = {feature.name: feature for feature in self.features}
        for feature in self.features:
            if feature.table is None:
                continue

            owner = by_name.get(feature.table)
            if owner is None or (owner.table and owner is not feature):
                raise ValueError(
                    f"feature '{feature.name}' shares the table of '{feature.table}', which has no "
                    f"table of its own.{nearest(feature.table, by_name)}"
                )
            if (owner.rows, owner.encoding) != (feature.rows, feature.encoding):
                raise ValueError(
                    f"feature '{feature.name}' and '{owner.name}' share a table: set the same rows "
                    "and encoding for both"
                )
        return self

    @model_validator(mode="after")
    def _check_group_by(self) -> Self:
        single = [feature.name for feature in self.features if feature.kind is Kind.SINGLE]
        if self.group_by and self.group_by not in single:
            known = [feature.name for feature in self.features]
            raise ValueError(
                f"group_by names '{self.group_by}', which is not a single-valued feature."
                f"{nearest(self.group_by, known)}"
            )
        return self

    @cached_property
    def single(self) -> tuple[SparseFeature, ...]:
        """Return the single-valued features in the order of column `sparse`, the domain last."""
        declared = [feature for feature in self.features if feature.kind is Kind.SINGLE]
        domain = SparseFeature(
            name=DOMAIN_FEATURE,
            encoding=Encoding.INDEX,
            rows=len(self.domains) + 1,
        )
        return (*declared, domain)

    @cached_property
    def bags(self) -> tuple[SparseFeature, ...]:
        """Return the multi-valued and sequence features, which have a list column each."""
        return tuple(feature for feature in self.features if feature.kind is not Kind.SINGLE)

    @cached_property
    def tables(self) -> dict[str, int]:
        """Return the number of rows of each embedding table by name."""
        return {
            feature.name: feature.rows
            for feature in (*self.single, *self.bags)
            if feature.table is None
        }

    @cached_property
    def digest(self) -> str:
        """Return a hash of the schema. Streams and snapshots fit together if theirs are equal."""
        content = self.model_dump(mode="json")
        return short_hash(content)

    def difference(self, other: Schema) -> str:
        """Describe the first difference to another schema, called "it", with another digest."""
        others = {feature.name: feature for feature in (*other.single, *other.bags)}
        for feature in (*self.single, *self.bags):
            if feature.name not in others:
                return f"it has no feature '{feature.name}'"

            other_mapping = _id_mapping(others[feature.name])
            mapping = _id_mapping(feature)
            if other_mapping != mapping:
                return (
                    f"it maps the ids of '{feature.name}' differently "
                    f"({other_mapping}, here {mapping})"
                )
        return "its lists of features, dense features, tasks or domains differ"

    def domain_index(self, name: str) -> int:
        """Return the position of a domain.

        Raises:
            ValueError: the domain does not exist; it suggests the nearest name.
        """
        return _position("domain", name, self.domains)

    def task_index(self, name: str) -> int:
        """Return the position of a task.

        Raises:
            ValueError: the task does not exist; it suggests the nearest name.
        """
        return _position("task", name, self.tasks)

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """Return the packed columns of a fragment."""
        fields = [
            pa.field("example_id", pa.int64()),
            pa.field("event_time", pa.int64()),
            pa.field("domain", pa.int32()),
            pa.field("labels", pa.list_(pa.float32(), len(self.tasks))),
            pa.field("sparse", pa.list_(pa.int32(), len(self.single))),
        ]
        if self.dense:  # Parquet cannot hold lists of width 0.
            fields.append(pa.field("dense", pa.list_(pa.float32(), len(self.dense))))
        for feature in self.bags:
            fields.append(pa.field(feature.name, pa.list_(pa.int32())))
        return pa.schema(fields)


def _id_mapping(feature: SparseFeature) -> str:
    """Describe how the ids of a feature become table rows."""
    table = feature.table or feature.name
    return f"{feature.encoding} into {feature.rows} rows of table '{table}'"


def _position(
    kind: str,
    name: str,
    known: Sequence[str],
) -> int:
    if name in known:
        return known.index(name)
    raise ValueError(
        f"unknown {kind} '{name}': the stream has {', '.join(known)}.{nearest(name, known)}"
    )
