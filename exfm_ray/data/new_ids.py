"""How many of a window's examples have ids that no window before it had: what a model cannot know
yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from exfm_ray.data.stream import EventStream, list_values
from exfm_ray.schema import ALL_DOMAINS, Schema
from exfm_ray.storage.atomic import write_json

FEATURES = 2
Array = np.ndarray[Any, Any]


def tracked_features(schema: Schema) -> list[str]:
    """The features that are counted: the one by which AUC is grouped (the user), then those of the
    largest tables, `FEATURES` in all."""
    return [
        f.name
        for f in sorted(schema.single[:-1], key=lambda f: (f.name != schema.group_by, -f.rows))
    ][:FEATURES]


def write_new_ids(stream: EventStream, path: Path) -> None:
    """Write `new_ids` of a complete stream, unless they are there."""
    if not path.exists():
        write_json(path, new_ids(stream))


def new_ids(stream: EventStream) -> list[dict[str, Any]]:
    """A row for each feature, window from the second on, and domain: `share` of its examples whose
    id's table row no example of an earlier window had. A missing id is not new; an id that shares
    its row with an older one is not told from it.

    Reads two columns of the stream once. Memory: a bit for each row of the watched tables, and a
    window's distinct rows.
    """
    first, *_ = stream.windows()
    names = [feature.name for feature in stream.schema.single]
    found: list[dict[str, Any]] = []
    seen = {
        name: _Seen(stream.schema.single[names.index(name)].rows)
        for name in tracked_features(stream.schema)
    }
    for window in stream.windows():
        examples_D = (
            np.array(
                [fragment.domain_rows for fragment in stream.window(window).fragments], np.int64
            )
            .reshape(-1, _domains(stream))
            .sum(0)
        )
        new_D = {name: np.zeros(_domains(stream)) for name in seen}
        distinct: dict[str, list[Array]] = {name: [] for name in seen}
        for fragment in stream.window(window).fragments:
            table = stream.read(window, fragment, ["domain", "sparse"])
            domain_N = table["domain"].to_numpy()
            sparse_NS = list_values(table["sparse"], len(names))
            for name, before in seen.items():
                row_N = sparse_NS[:, names.index(name)]
                new_D[name] += np.bincount(
                    domain_N, weights=before.lacks(row_N), minlength=_domains(stream)
                )
                distinct[name].append(np.unique(row_N))
        for name, before in seen.items():
            before.add(distinct[name])
            if window > first:
                found += [
                    {"feature": name, "window": window, **row}
                    for row in _shares(stream.schema, new_D[name], examples_D)
                ]
    return found


def _domains(stream: EventStream) -> int:
    return len(stream.schema.domains)


def _shares(
    schema: Schema,
    new_D: Array,
    examples_D: Array,
) -> list[dict[str, Any]]:
    """Of all domains together, where there are several, and of each that has examples."""
    rows = [(ALL_DOMAINS, new_D.sum(), examples_D.sum())] if len(schema.domains) > 1 else []
    rows += zip(schema.domains, new_D, examples_D, strict=True)
    return [
        {"domain": domain, "share": float(new / examples)}
        for domain, new, examples in rows
        if examples
    ]


class _Seen:
    """A set of table rows, a bit each."""

    def __init__(self, rows: int) -> None:
        self._bits = np.zeros(-(-rows // 8), np.uint8)
        self._bits[0] = 1  # row 0 stands for a missing id

    def lacks(self, row_N: Array) -> Array:
        """bool_N: rows that are not in the set."""
        lacks_N: Array = (self._bits[row_N >> 3] >> (row_N & 7)) & 1 == 0
        return lacks_N

    def add(self, distinct: list[Array]) -> None:
        """Take in rows; each array holds none twice."""
        for row_U in distinct:
            np.bitwise_or.at(self._bits, row_U >> 3, (1 << (row_U & 7)).astype(np.uint8))
