"""Jobs on a stream with late labels: they wait for the release, the DAS does not. Corrections are
learned but not evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_runs import run_locally, score, train
from small_runs import WINDOWS, assert_close, metrics, small_config
from workers import Workers

from exfm_ray.config.root import Config
from exfm_ray.data.labels.releases import release, release_folder
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.runner import PipelineRunner
from exfm_ray.pipeline.schedule import Role, vm_jobs
from exfm_ray.storage.atomic import read_jsonl
from exfm_ray.stores.supervision import SupervisionStore
from exfm_ray.training.job import Job

ROWS = 900
LATE: dict[str, Any] = {
    "attribution_s": {"click": 60, "conversion": 7200},
    "late_labels": "correct",
}


def late_config(
    folder: Path,
    name: str,
    arms: Sequence[str] = ("labels", "ah_sa"),
) -> Config:
    """The tiny run with late labels.

    Windows take an hour, so the last conversions of window t arrive by the end of window t + 2.
    """
    return small_config(folder, name, data=LATE, vm={"arms": arms})


def test_the_das_is_ahead_of_the_labels_and_a_run_resumes(
    tmp_path: Path, groups: dict[int, Workers]
) -> None:
    """Wrong: the DAS waits for labels, a job learns a window before its release, or a run that
    waited has other figures than one that did not wait."""
    whole = late_config(tmp_path, "whole")
    run_locally(groups, whole)
    config = late_config(tmp_path, "waiting")
    stream = prepare_stream(config)
    hidden = [
        release_folder(stream.root, window, "conversion") / "manifest.json" for window in (2, 3)
    ]
    hidden.append(stream.root / "manifest.json")
    contents = [path.read_bytes() for path in hidden]
    for path in hidden:  # the state of a followed stream before two deadlines
        path.unlink()
    fm_only = frozenset({Role.FM})
    fm_and_das = frozenset({Role.FM, Role.DAS})
    vm_only = frozenset({Role.VM})

    schedule = PipelineRunner(config, stream).schedule
    assert schedule.windows == [0, 1]
    groups[1].run(train, Job("fm", config), schedule.windows, None)
    scorable = schedule.scorable_windows(schedule.labelers[0], fm_only)
    assert scorable == [1, 2], "window 2 waits for its conversions, its supervision does not"
    groups[1].run(score, config, scorable)
    (job,) = vm_jobs(config)
    assert schedule.learnable_windows(job, fm_and_das) == [0, 1], (
        "the models of a shared pass wait for conversions"
    )
    clicks = Job("vm-feed", config, config.vm.models[:1])
    assert schedule.learnable_windows(clicks, vm_only) == [0, 1, 2], (
        "all clicks are known, and there is supervision up to window 2"
    )
    sharing = late_config(tmp_path, "waiting", arms=["labels", "ah+share"])
    sharing_schedule = PipelineRunner(sharing, stream).schedule
    assert sharing_schedule.learnable_windows(clicks, fm_and_das) == [0, 1], (
        "an export after window 2 would wait for snapshot 3"
    )
    groups[1].run(train, job, [0, 1], None)
    assert SupervisionStore(config.folder / "supervision", "fm").has(2)
    for path, content in zip(hidden, contents, strict=True):
        path.write_bytes(content)
    run_locally(groups, config)
    actual = metrics(config)
    expected = metrics(whole)
    assert actual.keys() == expected.keys()
    assert_close([actual[key] for key in expected], list(expected.values()), 1e-6)


def test_corrections_are_learned_and_not_evaluated(
    tmp_path: Path, groups: dict[int, Workers]
) -> None:
    """Wrong: corrections are not learned, or a window's figures include them."""
    config = late_config(tmp_path, "run")
    run_locally(groups, config)
    stream = prepare_stream(config)
    late = []
    for window in range(WINDOWS):
        releases = [release(stream, window, task) for task in LATE["attribution_s"]]
        late.append(sum(r.corrections.rows for r in releases if r.corrections))
    assert sum(late) > 3
    spans = [
        line
        for line in read_jsonl(config.folder / "timeline.jsonl")
        if line["role"] == "fm" and line["phase"] == "learn"
    ]
    assert [span["examples"] for span in spans] == [ROWS + corrections for corrections in late]
    fm = [row for row in metrics(config).values() if row["role"] == "fm" and row["domain"] == "all"]
    assert {row["examples"] for row in fm} == {ROWS}
    assert all(np.isfinite(row["ne"]) for row in fm if row["label_rate"])


def test_resumes_in_the_middle_of_a_window_with_corrections(
    tmp_path: Path, groups: dict[int, Workers]
) -> None:
    """Wrong: a job that resumes between two batches reads the corrections at other positions, so it
    learns some twice and others never."""
    rows = {}
    for name in ("whole", "killed"):
        config = small_config(
            tmp_path, name, data=LATE, vm={"models": []}, checkpoint={"every_examples": 200}
        )
        windows = prepare_stream(config).windows()
        for death in (5, None) if name == "killed" else (None,):
            groups[1].run(train, Job("fm", config), windows, None if death is None else 2, death)
        rows[name] = metrics(config)
    assert rows["whole"] == rows["killed"]


def test_an_unreleased_window_is_not_read(tmp_path: Path, groups: dict[int, Workers]) -> None:
    """Wrong: a job that is forced to learn a window before its release uses unknown labels."""
    config = late_config(tmp_path, "early")
    stream = prepare_stream(config)
    (release_folder(stream.root, 1, "click") / "manifest.json").unlink()
    with pytest.raises(AssertionError, match="window 1 is not released for task 'click'"):
        groups[1].run(train, Job("fm", config), [0, 1], None)
