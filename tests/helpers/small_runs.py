"""Whole runs on a tiny synthetic stream, for the tests of jobs, pipeline and rules."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exfm_ray.config.root import Config
from exfm_ray.data.stream import EventStream, Window, list_values, window_name
from exfm_ray.storage.atomic import write_json
from exfm_ray.tracking.recorder import IDENTITY, read_metrics

WINDOWS = 4
SETTINGS: dict[str, Any] = {
    "data": {
        "source": "synthetic",
        "fragment_rows": 250,
        "synthetic": {
            "windows": WINDOWS,
            "events_per_window": 900,
            "users": 150,
            "ads": 80,
            "advertisers": 10,
        },
    },
    "fm": {
        "model": {
            "type": "wukong",
            "dim": 4,
            "l": 1,
            "n_F": 2,
            "n_L": 2,
            "k": 2,
            "fmb_mlp": [8],
            "mlp": [8],
        },
        "batch_size": 64,
        "threads": 1,
    },
    "das": {"threads": 1},
    "vm": {
        "model": {"type": "mlp", "dim": 4, "mlp": [8]},
        "batch_size": 64,
        "threads": 1,
        "models": [
            {"name": "feed", "domain": "feed", "task": "click"},
            {
                "name": "stories",
                "domain": "stories",
                "task": "conversion",
                "model": {"type": "dcnv2", "dim": 4, "cross_layers": 1, "mlp": [8]},
            },
        ],
    },
    "metrics": {"warmup_windows": 1},
    "wandb": {"mode": "disabled"},
}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` applied, section by section."""
    result = dict(base)
    for key, value in changes.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, Mapping) else value
    return result


def small_config(
    folder: Path,
    name: str,
    **changes: Any,
) -> Config:
    """The tiny run in `folder`, with `changes` of its settings."""
    return Config.model_validate(
        merged(SETTINGS, {"name": name, "run": {"dir": folder}, **changes})
    )


def run(config: Config, *names: str) -> dict[str, Any]:
    """Run these roles, or all of them, to the end of the stream; returns the summary."""
    from exfm_ray.pipeline.preflight import prepare_stream
    from exfm_ray.pipeline.runner import PipelineRunner
    from exfm_ray.pipeline.schedule import ALL_ROLES, Role

    roles = frozenset(Role(name) for name in names) or ALL_ROLES
    runner = PipelineRunner(config, prepare_stream(config))
    runner.execute(roles)
    return runner.summarize()


def metrics(config: Config) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of metrics.jsonl by their identity, without the speed."""
    rows = read_metrics(config.folder / "metrics.jsonl")
    by_identity = {}
    for row in rows:
        identity = tuple(row[key] for key in IDENTITY)
        by_identity[identity] = {k: v for k, v in row.items() if k != "examples_per_s"}
    assert len(by_identity) == len(rows), "a row was written twice"
    return by_identity


def figures(config: Config) -> list[dict[str, Any]]:
    """The figures of summary.json, sorted."""
    rows: list[dict[str, Any]] = json.loads((config.folder / "summary.json").read_text())["figures"]
    return sorted(rows, key=lambda row: tuple(str(row[key]) for key in IDENTITY[1:]))


def assert_close(
    actual: Any,
    expected: Any,
    tolerance: float,
) -> None:
    """Assert that rows are equal, floats up to a tolerance."""
    assert len(actual) == len(expected)
    for row, expected_row in zip(actual, expected, strict=True):
        assert row.keys() == expected_row.keys()
        for key, value in expected_row.items():
            if isinstance(value, float) and row[key] is not None:
                message = f"{key} of {expected_row}"
                np.testing.assert_allclose(
                    row[key], value, rtol=tolerance, atol=tolerance, err_msg=message
                )
            else:
                assert row[key] == value, (key, expected_row)


def rewrite(
    stream: EventStream,
    window: int,
    change: Callable[[pa.Table], pa.Table],
) -> None:
    """Change the rows of a window's fragments and update its manifest."""
    fragments = []
    for fragment in stream.window(window).fragments:
        path = stream.path(window, fragment)
        pq.write_table(change(stream.read(window, fragment)), path)
        fragments.append(fragment.model_copy(update={"bytes": path.stat().st_size}))
    manifest: Window = stream.window(window).model_copy(update={"fragments": tuple(fragments)})
    write_json(
        stream.root / window_name(window) / "manifest.json", manifest.model_dump(mode="json")
    )


def flip_labels(table: pa.Table) -> pa.Table:
    """Replace every label by 1 - label."""
    width = table.schema.field("labels").type.list_size
    labels = 1 - list_values(table["labels"], width)
    index = table.column_names.index("labels")
    return table.set_column(
        index, "labels", pa.FixedSizeListArray.from_arrays(pa.array(labels.ravel()), width)
    )
