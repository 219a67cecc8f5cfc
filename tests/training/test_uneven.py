"""Windows whose rows do not divide by the number of workers: nothing hangs, no example is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from local_runs import run_locally, train
from small_runs import assert_close, metrics, small_config
from workers import Workers

from exfm_ray.config.root import Config
from exfm_ray.data.stream import EventStream, Window, window_name
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.storage.atomic import write_json
from exfm_ray.training.job import Job

ROWS = [130, 0, 1, 3, 65, 0]
"""Events in each window; a batch has 64. Windows 1 and 5 are empty, and in window 2 one worker has
no row."""
BAR = 1e-3
"""Tolerance, as in test_jobs.py."""


def cut(
    stream: EventStream,
    window: int,
    rows: int,
) -> None:
    """Keep only the first `rows` events of a window."""
    manifest = stream.window(window)
    left = rows
    fragments = []
    for fragment in manifest.fragments:
        table = stream.read(window, fragment).slice(0, left)
        left -= table.num_rows
        if table.num_rows:
            path = stream.path(window, fragment)
            pq.write_table(table, path)
            counts = np.bincount(
                table["domain"].to_numpy(), minlength=len(stream.schema.domains)
            ).tolist()
            changed = {
                "rows": table.num_rows,
                "bytes": path.stat().st_size,
                "domain_rows": tuple(counts),
            }
            fragments.append(fragment.model_copy(update=changed))
    whole: Window = manifest.model_copy(update={"rows": rows, "fragments": tuple(fragments)})
    write_json(stream.root / window_name(window) / "manifest.json", whole.model_dump(mode="json"))


@pytest.fixture(scope="module")
def base(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """One worker, all roles."""
    config = uneven(tmp_path_factory.mktemp("uneven"), 1)
    run_locally(groups, config)
    return config


def uneven(folder: Path, workers: int) -> Config:
    trainer = {"workers": workers, "zero_stage": 2}
    sizes = {"synthetic": {"windows": len(ROWS), "events_per_window": 200}}
    config = small_config(
        folder,
        f"workers{workers}",
        data=sizes,
        fm=trainer,
        vm=trainer,
        checkpoint={"every_examples": 50},
    )
    stream = prepare_stream(config)
    for window, rows in enumerate(ROWS):
        cut(stream, window, rows)
    shutil.rmtree(stream.root / "truth")  # it has the events that are cut off, too
    return config


def test_two_workers_learn_and_evaluate_every_row(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: a worker without rows hangs or counts padding rows, or an example is not learned or
    not evaluated."""
    config = uneven(tmp_path, 2)
    run_locally(groups, config)
    whole = [
        row
        for row in metrics(config).values()
        if row["role"] == "fm" and (row["domain"], row["task"]) == ("all", "click")
    ]
    assert {row["window"]: row["examples"] for row in whole} == {
        window: rows for window, rows in enumerate(ROWS) if rows
    }
    for run in (config, base):
        job = Job("fm", run)
        assert [
            timing.examples for timing in job.checkpoints.result(job.checkpoints.latest()).timings
        ] == ROWS
    rows = metrics(config)
    assert rows.keys() == metrics(base).keys()
    assert_close(list(rows.values()), [metrics(base)[key] for key in rows], BAR)


def test_a_kill_beside_an_empty_window(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: a job resumes at another batch if a window has none."""
    config = uneven(tmp_path, 1)
    for window, batches in ((0, 2), (1, None), (2, 1), (4, 1), (5, None), (None, None)):
        groups[1].run(train, Job("fm", config), list(range(len(ROWS))), window, batches)
    fm = {key: row for key, row in metrics(base).items() if row["role"] == "fm"}
    assert metrics(config) == fm
