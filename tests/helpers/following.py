"""Event and label files for tests of followed streams, and the labels that a follower delivers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from exfm_ray.config.root import Config
from exfm_ray.storage.remote import AnyPath

HOUR_MS = 3_600_000
SPEC: dict[str, Any] = {
    "format": "parquet",
    "files": "events_*.parquet",
    "event_time": {"column": "at", "unit": "ms"},
    "example_id": "id",
    "schema": {
        "features": [{"name": "user", "rows": 50}],
        "dense": [{"name": "price"}],
        "tasks": ["seen", "click", "buy"],
        "group_by": "user",
    },
}
DATA: dict[str, Any] = {
    "source": "table",
    "window": {"by": "time", "length_s": 3600},
    "fragment_rows": 20,
    "attribution_s": {"click": 600, "buy": 7200},
    "late_labels": "correct",
    "follow": {"labels": "labels_*.parquet", "lateness_s": 900, "poll_s": 0.05},
}


def make_log(
    windows: int,
    rows: int,
    seed: int,
) -> tuple[pa.Table, pa.Table]:
    """Return events over `windows` hours and their labels.

    Clicks follow after minutes, purchases after hours.
    """
    rng = np.random.default_rng(seed)
    count = windows * rows
    at = np.sort(rng.integers(0, windows * HOUR_MS, count))
    at[:: max(1, rows)] = np.arange(windows) * HOUR_MS  # no window is empty
    at.sort()
    ids = rng.permutation(count) + 1000
    events = pa.table(
        {
            "id": ids,
            "at": at,
            "user": rng.integers(0, 30, count),
            "price": rng.normal(size=count),
            "seen": rng.integers(0, 2, count),
        }
    )
    labels = []
    for task, fraction, mean_ms in (("click", 0.4, 400_000), ("buy", 0.2, HOUR_MS * 2)):
        chosen = rng.random(count) < fraction
        times = at[chosen] + rng.exponential(mean_ms, int(chosen.sum())).astype(np.int64)
        labels.append(
            pa.table(
                {
                    "example_id": ids[chosen],
                    "task": [task] * len(times),
                    "label": np.ones(len(times), np.int8),
                    "time_ms": times,
                }
            )
        )
    return events, pa.concat_tables(labels)


def expected(
    events: pa.Table,
    labels: pa.Table,
    windows: int,
    attribution_s: dict[str, int],
) -> dict[str, list[dict[int, int]]]:
    """Return task -> for each window the delivered ids, each with the window of its event.

    The rule is applied label by label.
    """
    at = dict(zip(events["id"].to_pylist(), events["at"].to_pylist(), strict=True))
    delivered: dict[str, list[dict[int, int]]] = {
        task: [{} for _ in range(windows)] for task in attribution_s
    }
    for row in labels.to_pylist():
        task = row["task"]
        example = row["example_id"]
        event_window = at[example] // HOUR_MS
        for window in range(event_window, windows):
            deadline_ms = (window + 1) * HOUR_MS + attribution_s[task] * 1000
            if row["time_ms"] < deadline_ms:
                delivered[task][window][example] = event_window
                break
    return delivered


def put(
    folder: Path,
    name: str,
    table: pa.Table,
) -> None:
    """Write a file under another name and rename it, as a producer does."""
    folder.mkdir(exist_ok=True, parents=True)
    pq.write_table(table, folder / ".coming")
    (folder / ".coming").rename(folder / name)


def lay_out(
    folder: Path,
    events: pa.Table,
    labels: pa.Table,
    pieces: int,
) -> None:
    """Put all events and labels into the folder, in several files each, and the end marker."""
    for kind, table in (("events", events), ("labels", labels)):
        size = -(-table.num_rows // pieces)
        for i in range(pieces):
            put(folder / "raw", f"{kind}_{i:03d}.parquet", table.slice(i * size, size))
    (folder / "raw" / "_END").touch()


def followed(
    folder: Path,
    name: str = "run",
    storage: str | None = None,
    **data: Any,
) -> Config:
    """Return a config that follows `folder`/raw."""
    spec = folder / "schema.yaml"
    spec.write_text(yaml.safe_dump(SPEC))
    settings = {**DATA, "root": folder / "raw", "schema_file": spec, **data}
    return Config.model_validate(
        {"name": name, "run": {"dir": folder / "runs", "storage": storage}, "data": settings}
    )


def contents(root: AnyPath) -> dict[str, bytes]:
    """Return the bytes of all files of a stream, by relative path."""
    files = [path for path in root.rglob("*") if not isinstance(path, Path) or path.is_file()]
    return {"/".join(path.parts[len(root.parts) :]): path.read_bytes() for path in files}
