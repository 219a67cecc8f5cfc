"""`pipeline` over a growing stream: it learns the same as over the complete stream."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import yaml
from following import DATA, HOUR_MS, SPEC, make_log, put
from local_runs import run_locally
from small_runs import SETTINGS, figures, merged, metrics
from workers import Workers

from exfm_ray.cli.main import main
from exfm_ray.config.load import load_config
from exfm_ray.pipeline.preflight import follow_stream
from exfm_ray.storage.atomic import read_json
from exfm_ray.tracking.recorder import read_metrics

WINDOWS = 5
WAIT_S = 240
BREAK_MS = int(3.5 * HOUR_MS)
CHANGES: dict[str, Any] = {
    "das": {"max_actors": 1},
    "vm": {
        "arms": ["labels", "ah_sa"],
        "shared_pass": False,
        "models": [
            {"name": "clicks", "domain": "all", "task": "click"},
            {"name": "buys", "domain": "all", "task": "buy"},
        ],
    },
}


@pytest.mark.slow
def test_a_stream_that_grows(
    cluster: None,
    groups: dict[int, Workers],
    tmp_path: Path,
) -> None:
    """Wrong: a pipeline over an open stream ends too soon or never, learns unreleased windows, or
    has other figures than over the complete stream."""
    raw = tmp_path / "raw"
    spec = tmp_path / "schema.yaml"
    file = tmp_path / "run.yaml"
    spec.write_text(yaml.safe_dump(SPEC))
    data = {**DATA, "root": str(raw), "schema_file": str(spec)}
    file.write_text(
        yaml.safe_dump(
            merged({**SETTINGS, "data": data}, {**CHANGES, "run": {"dir": str(tmp_path / "runs")}})
        )
    )
    config = load_config(file)
    events, labels = make_log(WINDOWS, 300, seed=4)

    def hand_over(
        number: int,
        start_ms: float,
        end_ms: float,
    ) -> None:
        for kind, table, column in (("labels", labels, "time_ms"), ("events", events, "at")):
            put(
                raw,
                f"{kind}_{number}.parquet",
                table.filter(
                    pc.and_(
                        pc.greater_equal(table[column], start_ms), pc.less(table[column], end_ms)
                    )
                ),
            )

    seen: list[set[tuple[str, int]]] = []

    def learned_windows() -> set[tuple[str, int]]:
        rows = read_metrics(config.folder / "metrics.jsonl")
        return {(row["model"], row["window"]) for row in rows}

    def produce() -> None:
        """Deliver the rest once two windows of clicks and one of all tasks are learned."""
        deadline = time.monotonic() + WAIT_S
        while ("clicks", 1) not in learned_windows():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(2.0)  # nothing more must be learned from the data so far
        seen.append(learned_windows())
        hand_over(1, BREAK_MS, float("inf"))
        (raw / "_END").touch()

    hand_over(0, 0, BREAK_MS)
    threads = [
        threading.Thread(target=work, daemon=True)
        for work in (lambda: follow_stream(config), produce)
    ]
    threads[0].start()
    while not (config.folder / "stream" / "window=002" / "manifest.json").exists():
        time.sleep(0.1)
    threads[1].start()
    assert main(["pipeline", "--config", str(file)]) == 0
    for thread in threads:
        thread.join(WAIT_S)
    assert seen == [{("fm", 0), ("buys", 0), ("clicks", 0), ("clicks", 1)}]
    assert read_json(config.folder / "stream" / "manifest.json")["windows"] == list(range(WINDOWS))
    whole = config.model_copy(update={"name": "whole"})
    shutil.copytree(config.folder / "stream", whole.folder / "stream")
    run_locally(groups, whole)
    assert metrics(config) == metrics(whole) and len(metrics(config)) > 4 * WINDOWS
    assert figures(config) == figures(whole)
