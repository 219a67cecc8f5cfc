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
    """`base` with `changes` put in, section by section."""
    result = dict(base)
    for key, value in changes.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, Mapping) else value
    return result


def small_config(
    folder: Path,
    name: str,
    **changes: Any,
) -> Config:
    """The tiny run, in `folder`, with other settings where asked for."""
    return Config.model_validate(
        merged(SETTINGS, {"name": name, "run": {"dir": folder}, **changes})
    )


def run(
    config: Config,
    fm: bool = True,
    das: bool = True,
    vm: bool = True,
) -> dict[str, Any]:
    """Run roles to the end of the stream; the summary."""
    from exfm_ray.pipeline.preflight import prepare_stream
    from exfm_ray.pipeline.runner import PipelineRunner

    whole = PipelineRunner(config, prepare_stream(config))
    whole.execute(fm, das, vm)
    return whole.summarise()


def metrics(config: Config) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of metrics.jsonl by their identity, without the speed; no row twice."""
    rows = read_metrics(config.folder / "metrics.jsonl")
    found = {
        tuple(row[key] for key in IDENTITY): {k: v for k, v in row.items() if k != "examples_per_s"}
        for row in rows
    }
    assert len(found) == len(rows), "a row was written twice"
    return found


def figures(config: Config) -> list[dict[str, Any]]:
    """The figures of summary.json in one order."""
    rows: list[dict[str, Any]] = json.loads((config.folder / "summary.json").read_text())["figures"]
    return sorted(rows, key=lambda row: tuple(str(row[key]) for key in IDENTITY[1:]))


def assert_close(
    found: Any,
    expected: Any,
    tolerance: float,
) -> None:
    """Rows equal, floats to a relative tolerance."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, float) and one[key] is not None:
                np.testing.assert_allclose(
                    one[key], value, rtol=tolerance, atol=tolerance, err_msg=f"{key} of {other}"
                )
            else:
                assert one[key] == value, (key, other)


def rewrite(
    stream: EventStream,
    window: int,
    change: Callable[[pa.Table], pa.Table],
) -> None:
    """Put changed rows into a window's fragments, and the manifest right."""
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
    """Every label the other way round."""
    width = table.schema.field("labels").type.list_size
    labels = 1 - list_values(table["labels"], width)
    index = table.column_names.index("labels")
    return table.set_column(
        index, "labels", pa.FixedSizeListArray.from_arrays(pa.array(labels.ravel()), width)
    )
