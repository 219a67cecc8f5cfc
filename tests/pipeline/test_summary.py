"""summary.json compared with figures computed from the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example import make_stream
from small_runs import small_config

from exfm_ray.data.stream import EventStream, list_values, window_name
from exfm_ray.metrics.state import MetricState
from exfm_ray.pipeline.summary import oracle_ne, summary_rows
from exfm_ray.training.checkpoint import JobResult


def ne_of(truth: np.ndarray, labels: np.ndarray) -> float:
    """NE of probabilities, by definition."""
    rate = labels.mean(dtype=np.float64)
    truth = truth.astype(np.float64)
    happened = np.where(labels > 0.5, truth, 1 - truth)
    return float(np.log(happened).mean() / (rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))


def write_truth(stream: EventStream, window: int) -> np.ndarray:
    """Write random true probabilities of a window; returns them, (rows, tasks)."""
    rows = stream.window(window).rows
    truth = np.random.default_rng(window).uniform(0.05, 0.9, (rows, 2)).astype(np.float32)
    path = stream.root / "truth" / f"{window_name(window)}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(
        pa.table({task: truth[:, i] for i, task in enumerate(stream.schema.tasks)}), path
    )
    return truth


def test_best_ne_is_that_of_the_true_probabilities(stream: EventStream) -> None:
    """Wrong: the bound is of other rows, tasks or domains, or includes the warm-up."""
    truth = np.concatenate([write_truth(stream, window) for window in (0, 1, 2)][1:])
    tables = [
        stream.read(window, fragment)
        for window in (1, 2)
        for fragment in stream.window(window).fragments
    ]
    labels = np.concatenate([list_values(table["labels"], 2) for table in tables])
    domain = np.concatenate([table["domain"].to_numpy() for table in tables])
    best = oracle_ne(stream, [1, 2])
    for i, task in enumerate(stream.schema.tasks):
        assert best["all", task] == pytest.approx(ne_of(truth[:, i], labels[:, i]), rel=1e-9)
        for j, name in enumerate(stream.schema.domains):
            in_domain = domain == j
            assert best[name, task] == pytest.approx(
                ne_of(truth[in_domain, i], labels[in_domain, i]), rel=1e-9
            )
    assert len(best) == 8


def test_without_truth_there_is_no_bound(tmp_path: Path) -> None:
    """Wrong: real data sets without known probabilities fail or get a bound."""
    assert oracle_ne(make_stream(tmp_path, windows=1), [0]) == {}


def state(quality: float) -> MetricState:
    labels = np.tile([0.0, 1.0], 500)
    return MetricState.from_logits((labels - 0.5) * quality, labels)


def test_gains_compare_the_same_examples(stream: EventStream, tmp_path: Path) -> None:
    """Wrong: a gain is over another arm or domain, the ratio of gains is inverted, or arms come in
    another order than in the config."""
    states = {
        ("vm", arm, "feed", "click"): state(q)
        for arm, q in (("ah", 0.5), ("labels", 1.0), ("kd", 1.5))
    }
    states |= {("fm", "fm", "feed", "click"): state(3.0), ("fm", "fm", "all", "click"): state(9.0)}
    other_task = {
        ("vm", arm, "feed", "conversion"): state(q)
        for arm, q in (("labels", 0.3), ("kd", 2.5), ("ah", 4.0))
    }
    states |= other_task | {("fm", "fm", "feed", "conversion"): state(0.7)}
    config = small_config(tmp_path, "x")
    all_rows = summary_rows(config, stream, [JobResult(states, [])])
    assert len(all_rows) == len(states)
    assert [row["arm"] for row in all_rows if row["model"] == "vm"] == [
        "labels",
        "labels",
        "kd",
        "kd",
        "ah",
        "ah",
    ]
    rows = {
        (row["model"], row["arm"], row["domain"]): row for row in all_rows if row["task"] == "click"
    }
    ne = {key: row["ne"] for key, row in rows.items()}
    base = ne["vm", "labels", "feed"]
    fm = ne["fm", "fm", "feed"]
    for arm in ("kd", "ah"):
        row = rows["vm", arm, "feed"]
        assert row["ne_gain"] == pytest.approx((base - row["ne"]) / base)
        assert row["transfer_ratio"] == pytest.approx((base - row["ne"]) / (base - fm))
        # The last of three windows is window 2, which version 2 supervises with fm_lag 1.
        assert row["snapshot"] == 2
    assert (
        rows["vm", "ah", "feed"]["transfer_ratio"] < 0 < rows["vm", "kd", "feed"]["transfer_ratio"]
    )
    labels = rows["vm", "labels", "feed"]
    assert (
        labels["ne_gain"] == 0 and labels["transfer_ratio"] is None and labels["snapshot"] is None
    )
    assert "ne_gain" not in rows["fm", "fm", "all"] and rows["fm", "fm", "feed"]["role"] == "fm"
