"""Share of a window's examples whose ids no earlier window had, which no model can know yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exfm_ray.data.stream import EventStream, list_values
from exfm_ray.schema import ALL_DOMAINS, Schema, SparseFeature
from exfm_ray.storage.atomic import write_json

FEATURES = 2
Array = np.ndarray[Any, Any]


def tracked_features(schema: Schema) -> list[str]:
    """The `FEATURES` features that are counted.

    They are the feature by which AUC is grouped (the user), then those of the largest tables.
    """

    def priority(feature: SparseFeature) -> tuple[bool, int]:
        return feature.name != schema.group_by, -feature.rows

    without_domain = schema.single[:-1]
    features = sorted(without_domain, key=priority)
    return [feature.name for feature in features[:FEATURES]]


def write_new_ids(stream: EventStream, path: Path) -> None:
    """Write `new_ids` of a complete stream to `path`, unless the file exists."""
    if path.exists():
        return
    rows = new_ids(stream)
    write_json(path, rows)


def new_ids(stream: EventStream) -> list[dict[str, Any]]:
    """Count the examples with new ids.

    An id is new when no example of an earlier window has its table row. A missing id is not new,
    and an id that shares its row with an older one cannot be distinguished from it. Reads two
    columns of the stream once. Memory: one bit for each row of the tracked tables, and the distinct
    rows of a window.

    Returns:
        A row for each feature, window from the second on, and domain; `share` is the fraction of
        the domain's examples whose id is new.
    """
    first, *_ = stream.windows()
    positions = {feature.name: i for i, feature in enumerate(stream.schema.single)}
    seen = {}
    for name in tracked_features(stream.schema):
        feature = stream.schema.single[positions[name]]
        seen[name] = _SeenRows(feature.rows)

    rows: list[dict[str, Any]] = []
    for window in stream.windows():
        examples_D = _examples(stream, window)
        new_D = _count_new(stream, window, positions, seen)
        if window == first:
            continue
        for name, count_D in new_D.items():
            for row in _fractions(stream.schema, count_D, examples_D):
                rows.append({"feature": name, "window": window, **row})
    return rows


def _examples(stream: EventStream, window: int) -> Array:
    """int64 (D,): examples of a window in each domain."""
    fragments = stream.window(window).fragments
    domain_rows = [fragment.domain_rows for fragment in fragments]
    domains = len(stream.schema.domains)
    counts_FD = np.array(domain_rows, np.int64).reshape(-1, domains)
    return np.asarray(counts_FD.sum(0))


def _count_new(
    stream: EventStream,
    window: int,
    positions: Mapping[str, int],
    seen: Mapping[str, _SeenRows],
) -> dict[str, Array]:
    """For each tracked feature the examples with a new id in each domain (D,).

    Adds the rows of the window to `seen`.
    """
    domains = len(stream.schema.domains)
    new_D = {name: np.zeros(domains) for name in seen}
    distinct: dict[str, list[Array]] = {name: [] for name in seen}
    for domain_N, sparse_NS in _columns(stream, window):
        for name, rows in seen.items():
            row_N = sparse_NS[:, positions[name]]
            unseen_N = rows.unseen(row_N)
            new_D[name] += np.bincount(domain_N, weights=unseen_N, minlength=domains)
            distinct[name].append(np.unique(row_N))

    for name, rows in seen.items():
        rows.add(distinct[name])
    return new_D


def _columns(stream: EventStream, window: int) -> Iterator[tuple[Array, Array]]:
    """Domains (N,) and table rows of the single-valued features (N, S) of each fragment."""
    width = len(stream.schema.single)
    for fragment in stream.window(window).fragments:
        table = stream.read(window, fragment, ["domain", "sparse"])
        domain_N = table["domain"].to_numpy()
        sparse_NS = list_values(table["sparse"], width)
        yield domain_N, sparse_NS


def _fractions(
    schema: Schema,
    new_D: Array,
    examples_D: Array,
) -> list[dict[str, Any]]:
    """The fraction of new ids in all domains together, if there are several, and in each."""
    counts = []
    if len(schema.domains) > 1:
        counts.append((ALL_DOMAINS, new_D.sum(), examples_D.sum()))
    counts += zip(schema.domains, new_D, examples_D, strict=True)

    rows = []
    for domain, new, examples in counts:
        if examples:
            fraction = float(new / examples)
            rows.append({"domain": domain, "share": fraction})
    return rows


class _SeenRows:
    """A set of table rows that uses one bit for each."""

    def __init__(self, rows: int) -> None:
        size = -(-rows // 8)
        self._bits = np.zeros(size, np.uint8)
        self._bits[0] = 1  # row 0 stands for a missing id

    def unseen(self, row_N: Array) -> Array:
        """bool (N,): rows that are not in the set."""
        byte_N = self._bits[row_N >> 3]
        shifted_N = byte_N >> (row_N & 7)
        unseen_N: Array = shifted_N & 1 == 0
        return unseen_N

    def add(self, distinct: list[Array]) -> None:
        """Add rows. No array holds a row twice."""
        for row_U in distinct:
            mask_U = (1 << (row_U & 7)).astype(np.uint8)
            np.bitwise_or.at(self._bits, row_U >> 3, mask_U)
