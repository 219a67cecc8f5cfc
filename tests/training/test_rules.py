"""The rules of the loop on whole runs: evaluate before learning, no teacher that knows the labels,
each example scored once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_runs import run_locally
from small_runs import WINDOWS, flip_labels, metrics, rewrite, small_config
from workers import Workers

from exfm_ray.config.root import Config
from exfm_ray.das.labeler import Labeler
from exfm_ray.data.stream import EventStream, window_name
from exfm_ray.pipeline.preflight import prepare_stream

CHANGED = 2
Runs = tuple[Config, Config]


@pytest.fixture(scope="module", params=[1, 2])
def runs(
    groups: dict[int, Workers],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Runs:
    """A run, and one on a stream with flipped labels from window CHANGED on; fm_lag 1 and 2."""
    folder = tmp_path_factory.mktemp("rules")
    config, changed = (
        small_config(folder, name, das={"fm_lag": request.param}) for name in ("as_is", "changed")
    )
    stream = prepare_stream(changed)
    for window in range(CHANGED, WINDOWS):
        rewrite(stream, window, flip_labels)
    run_locally(groups, config)
    run_locally(groups, changed)
    return config, changed


def mean_predictions(config: Config) -> dict[tuple[Any, ...], float | None]:
    """Mean prediction of every row of metrics.jsonl, in which the labels cancel out."""
    rows = metrics(config).items()
    return {
        key: row["calibration"] * row["label_rate"] if row["calibration"] is not None else None
        for key, row in rows
    }


def test_evaluates_before_it_learns(runs: Runs) -> None:
    """Wrong: a window's figures come from a model that has learned some of it (rule 1)."""
    as_is, changed = (mean_predictions(config) for config in runs)
    assert as_is.keys() == changed.keys()
    arms = {key[3] for key in as_is}
    assert arms == {"fm", "labels", "kd", "ah", "ah_sa"}
    moved = set()
    for key, mean in as_is.items():
        if mean is None or changed[key] is None:
            continue
        if key[0] <= CHANGED:
            np.testing.assert_allclose(
                changed[key], mean, rtol=1e-12, err_msg=str(key)
            )  # rounding of (p / y) * (y / n)
        elif abs(changed[key] - mean) > 1e-4:
            moved.add(key[3])
    assert moved == arms, "the test has no power: these labels change no later prediction"


def test_the_teacher_does_not_know_the_labels(runs: Runs) -> None:
    """Wrong: a window's supervision depends on that window's labels (rule 2)."""
    lag = runs[0].das.fm_lag
    for window in range(lag, WINDOWS):
        files = [
            sorted((c.folder / "supervision" / "fm" / window_name(window)).glob("*.parquet"))
            for c in runs
        ]
        assert len(files[0]) == len(files[1]) == 4
        equal = [one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True)]
        assert all(equal) if window < CHANGED + lag else not any(equal), window


def test_every_example_is_scored_once(runs: Runs, groups: dict[int, Workers]) -> None:
    """Wrong: examples are missing from the supervision or are in it twice, or a second pass scores
    again (rule 3)."""
    import pyarrow.parquet as pq
    from local_runs import score

    config = runs[0]
    stream = EventStream.open(config.folder / "stream")
    das = Labeler(config, stream)
    for window in range(config.das.fm_lag, WINDOWS):
        manifest = stream.window(window)
        events = np.concatenate(
            [
                stream.read(window, f, ["example_id"])["example_id"].to_numpy()
                for f in manifest.fragments
            ]
        )
        files = [
            pq.read_table(das.store.path(window, f), partitioning=None)["example_id"].to_numpy()
            for f in manifest.fragments
        ]
        np.testing.assert_array_equal(np.concatenate(files), events)
        assert len(np.unique(events)) == len(events)
    assert groups[1].run(score, config) == [0]


def test_scored_rows_do_not_depend_on_the_number_of_vms(
    groups: dict[int, Workers], tmp_path: Path
) -> None:
    """Wrong: each vertical model has the FM score its own copy (rule 3)."""
    from local_runs import score, train

    from exfm_ray.training.job import Job

    models = [{"name": f"vm{i}", "domain": "feed", "task": "click"} for i in range(3)]
    scored = []
    for count in (0, 1, 3):
        config = small_config(tmp_path, f"vms{count}", vm={"models": models[:count]})
        stream = prepare_stream(config)
        groups[1].run(train, Job("fm", config), stream.windows(), None)
        scored += groups[1].run(score, config)
    assert scored == [(WINDOWS - 1) * 900] * 3
