"""The rows that trials read from memory equal those of the run's own readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from small_runs import small_config

from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.readers import WindowPass
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.supervision import SupervisionStore
from exfm_ray.training.job import Job
from tuning.rows import StudentRows


def test_corrections_are_learned_and_not_evaluated(tmp_path: Path) -> None:
    """Wrong: a trial's figures include corrections, or it learns without them."""
    late = {"attribution_s": {"click": 1}, "late_labels": "correct"}
    config = small_config(tmp_path, "late", data=late, vm={"arms": ["labels", "kd"]})
    stream = prepare(config)
    student = config.vm.models[0]
    store = SupervisionStore(config.folder / "supervision", "fm")
    for window in stream.windows()[1:]:
        for fragment in stream.window(window).fragments:
            ids = stream.read(window, fragment, ["example_id"])["example_id"]
            store.write(
                window, fragment, ids, window, {"click": np.full(len(ids), 0.5, np.float32)}
            )
        store.commit(stream.window(window), window, ("click",), SnapshotPolicy(1))
    rows = StudentRows.read_from(config, student, stream.windows())
    reader = Job("vm-feed", config, (student,)).reader(stream.schema)
    corrections = 0
    for window in stream.windows():
        for purpose in ("evaluate", "learn"):
            window_pass = WindowPass(window, purpose)  # type: ignore[arg-type]
            assert list(rows.fragments(window_pass)) == list(reader.fragments(window_pass))
            for fragment in rows.fragments(window_pass):
                table = rows.read(window_pass, fragment)
                expected = reader.read(window_pass, fragment)
                assert table["example_id"].equals(expected["example_id"])
                corrections += table.num_rows if purpose == "learn" else -table.num_rows
    assert corrections > 3
