"""schema.json of a served folder: how raw values become the graph's inputs.

It is precise enough to be implemented in another language.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from exfm_ray.data.prepare.encode import hash_rows, salt
from exfm_ray.data.prepare.normalizer import LIMIT
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.models.layout import table_of
from exfm_ray.models.user_features import HISTORY
from exfm_ray.schema import DOMAIN_FEATURE, Encoding, Schema, SparseFeature
from exfm_ray.storage.atomic import read_json

EXAMPLES: dict[str, tuple[Any, ...]] = {
    "text": ("", "a", "café", "12345"),
    "integer": (0, 12345, -1),
    "number": (0.0, 0.5),
}
LOOK_UP = (
    "row of feature `key` -> its place in `users` (ascending) -> that row of `inputs`, zeros where "
    "it is not there; behind the rest of dense_BD"
)
MAPPING = {
    "missing": "row 0 of every table",
    "index": "an integer v in [0, rows - 1) is row v + 1",
    "hash": "row = mix((bits XOR salt) + 0x9E3779B97F4A7C15) mod (rows - 1) + 1, all in unsigned "
    "64-bit arithmetic",
    "mix": "z = (x XOR x >> 30) * 0xBF58476D1CE4E5B9; z = (z XOR z >> 27) * 0x94D049BB133111EB; "
    "z XOR z >> 31",
    "bits": "of text: mix(SipHash-2-4 of its UTF-8 bytes), the hash's key being the 16 bytes "
    "'0123456789123456'; of an integer: its two's complement; of a number: its IEEE 754 binary64, "
    "-0 as 0. Which of them a column holds is what prepare read it as.",
    "bag": "its values in event order, the most recent last; missing ones left out, then the last "
    "max_length kept",
    "bag_values_V": "values of the first bag, example after example, then those of the second, and "
    "so on",
    "bag_lengths_MB": "how many values each bag has in each example",
    "dense": "none: x; log1p: sign(x) log(1 + |x|); then (that - mean) / std, 0 where missing or "
    "not finite, cut to [-limit, limit]",
}


def served_schema(
    schema: Schema,
    stream: EventStream,
    history: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the content of schema.json.

    It has the columns of the inputs in order, the tables with examples, and the normalization
    after the stream's last window.

    Args:
        schema: schema of the stream.
        stream: the stream, for the normalization.
        history: the `history` entry of `StoredModel.facts`, if the model has one.
    """
    table_owners = [f for f in (*schema.single, *schema.bags) if f.table is None]
    content = {
        "digest": schema.digest,
        "tasks": list(schema.tasks),
        "sparse_BS": [_column(feature) for feature in schema.single],
        "bags": [_bag(feature) for feature in schema.bags],
        "dense_BD": _dense(schema, stream),
        "limit": LIMIT,
        "domains": {name: schema.domain_index(name) + 1 for name in schema.domains},
        "tables": {feature.name: _table(feature) for feature in table_owners},
        "mapping": {**MAPPING, DOMAIN_FEATURE: "the row that `domains` gives its name"},
    }
    if history:
        content["history"] = {"file": HISTORY, **history, "mapping": LOOK_UP}
    return content


def _column(feature: SparseFeature) -> dict[str, Any]:
    return {"name": feature.name, "table": table_of(feature)}


def _bag(feature: SparseFeature) -> dict[str, Any]:
    kind = str(feature.kind)
    return {**_column(feature), "kind": kind, "max_length": feature.max_length}


def _table(feature: SparseFeature) -> dict[str, Any]:
    content: dict[str, Any] = {"rows": feature.rows, "encoding": str(feature.encoding)}
    if feature.encoding is Encoding.INDEX:
        return content

    content["salt"] = f"0x{int(salt(feature.name)):016X}"
    content["examples"] = _examples(feature)
    return content


def _examples(feature: SparseFeature) -> list[list[Any]]:
    """Raw values and their rows, to test another implementation: kind, value, row."""
    examples: list[list[Any]] = []
    for kind, values in EXAMPLES.items():
        rows = hash_rows(pa.array(values), feature.name, feature.rows).tolist()
        for value, row in zip(values, rows, strict=True):
            examples.append([kind, value, row])
    return examples


def _dense(schema: Schema, stream: EventStream) -> list[dict[str, Any]]:
    if not schema.dense:
        return []
    manifest = stream.root / "manifest.json"
    moments = read_json(manifest).get("dense", {})

    columns = []
    for feature in schema.dense:
        if feature.name not in moments:
            raise UserError(
                f"{manifest}: has no mean and std of dense feature '{feature.name}'; "
                "prepare the stream again"
            )
        columns.append(
            {
                "name": feature.name,
                "transform": feature.transform,
                "mean": moments[feature.name]["mean"],
                "std": moments[feature.name]["std"],
            }
        )
    return columns
