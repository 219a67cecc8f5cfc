"""Teachers other than the FM: a vertical model that teaches others, and another run's FM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from local_runs import train
from pydantic import ValidationError
from small_runs import WINDOWS, merged, metrics, run, small_config
from workers import Workers

from exfm_ray.config.distillation import DistillationConfig, ShareConfig
from exfm_ray.config.root import Config
from exfm_ray.das.labeler import Labeler
from exfm_ray.data.batch import to_batch
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.models.serialization import load_model
from exfm_ray.pipeline.preflight import check_models, prepare_stream
from exfm_ray.pipeline.runner import PipelineRunner
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.schema import Schema
from exfm_ray.stores.shared_rows import SharedStore
from exfm_ray.training.job import Job

CHAIN: dict[str, Any] = {
    "teachers": [{"name": "feed_fm"}],
    "das": {"keep_snapshots": True},
    "vm": {
        "arms": ["labels", "ah", "labels+share"],
        "models": [
            {"name": "feed_fm", "domain": "feed", "task": "click", "published_arm": "ah"},
            {"name": "feed", "domain": "feed", "task": "click", "teacher": "feed_fm"},
            {"name": "search", "domain": "search", "task": "click"},
        ],
    },
}


def score(config: Config, number: int) -> int:
    """Run the DAS of the FM (0) or of another teacher in a worker; returns the number of rows."""
    stream = EventStream.open(config.folder / "stream")
    teacher = (None, *config.teachers)[number]
    return Labeler(config, stream, teacher).label_locally(stream.windows())


@pytest.fixture(scope="module")
def chain(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """FM -> feed_fm -> feed, each to the end of the stream."""
    config = small_config(tmp_path_factory.mktemp("chain"), "chain", **CHAIN)
    stream = prepare_stream(config)
    groups[1].run(train, Job("fm", config), stream.windows(), None)
    for number, job in enumerate(vm_jobs(config)):
        groups[1].run(score, config, number)
        groups[1].run(train, job, stream.windows(), None)
    return config


def test_each_job_has_one_teacher(chain: Config) -> None:
    """Wrong: a vertical model learns from another teacher than it names, or its job waits for a
    teacher in the same job."""
    jobs = vm_jobs(chain)
    assert [(job.name, job.teacher, [s.name for s in job.students]) for job in jobs] == [
        ("vm", "fm", ["feed_fm", "search"]),
        ("vm-of-feed_fm", "feed_fm", ["feed"]),
    ]


def test_a_vertical_model_is_a_teacher(chain: Config) -> None:
    """Wrong: the domain FM publishes another arm's weights or misses a window, or a snapshot
    supervises a window that it has learned (rule 2)."""
    stream = EventStream.open(chain.folder / "stream")
    das = Labeler(chain, stream, chain.teachers[0])
    assert das.snapshots.versions() == list(range(1, WINDOWS + 1))
    last, exported = (
        load_model(folder)[0]
        for folder in (das.snapshots.folder(WINDOWS), chain.folder / "exported" / "feed_fm-ah")
    )
    for one, other in zip(last.parameters(), exported.parameters(), strict=True):
        assert torch.equal(one, other)
    for window in range(1, WINDOWS):
        model, manifest = load_model(das.snapshots.folder(window))
        assert manifest.tasks == ("click",) and das.store.manifest(window).snapshot == window
        for fragment in stream.window(window).fragments:
            written = pq.read_table(das.store.path(window, fragment))
            expected = model.score(to_batch(stream.read(window, fragment), stream.schema))[
                :, 0
            ].numpy()
            np.testing.assert_allclose(
                written["prediction:click"].to_numpy(), expected, rtol=1e-6
            )  # the batches differ


def test_a_student_learns_from_the_teacher_it_names(chain: Config) -> None:
    """Wrong: `feed` learns from the FM's supervision although it names another teacher."""
    summary = PipelineRunner(chain, EventStream.open(chain.folder / "stream")).summarize()
    ne = {
        (row["model"], row["arm"]): row["ne"] for row in summary["figures"] if row["role"] == "vm"
    }
    assert ne["feed", "labels"] == ne["feed_fm", "labels"], (
        "the same model and rows, and no teacher"
    )
    assert ne["feed", "ah"] != ne["feed_fm", "ah"], "the same model and rows, and two teachers"
    assert summary["roles"]["das-feed_fm"]["examples"] == 0, "timed only as a service"


@pytest.mark.slow
def test_a_chain_side_by_side_on_ray(
    cluster: None,
    chain: Config,
    tmp_path: Path,
) -> None:
    """Wrong: side by side, FM, domain FM and vertical model wait forever, or a student learns from
    another teacher's supervision."""
    config = small_config(tmp_path, "ray", **CHAIN)
    summary = run(config)
    assert metrics(config) == metrics(chain)
    assert {name: role["examples"] for name, role in summary["roles"].items() if "das" in name} == {
        "das": 2700,
        "das-feed_fm": 2700,
    }


def test_another_runs_fm_is_a_teacher(groups: dict[int, Workers], chain: Config) -> None:
    """Wrong: another run's snapshots are missed, score differently here, or are removed."""
    settings = {
        "fm": {"name": "own"},
        "teachers": [{"name": "fm", "run": chain.folder}],
        "vm": {"models": []},
    }
    config = small_config(chain.run.dir, "other", **settings)
    prepare_stream(config)
    assert groups[1].run(score, config, 1) == [(WINDOWS - 1) * 900]
    here, there = (run.folder / "supervision" / "fm" for run in (config, chain))
    files = {path.relative_to(there): path.read_bytes() for path in there.glob("window=*/*")}
    assert (
        files == {path.relative_to(here): path.read_bytes() for path in here.glob("window=*/*")}
        and len(files) > WINDOWS
    )


def assert_served_with(
    config: Config,
    student: str,
    snapshot: Path,
) -> None:
    """Assert that a student with shared rows is exported with the rows of this snapshot."""
    teacher, served = (
        load_model(folder)[0].tables.tables()
        for folder in (snapshot, config.folder / "exported" / f"{student}-labels+share")
    )
    assert all(torch.equal(table, teacher[name]) for name, table in served.items())


def test_rows_are_those_of_the_teacher_that_a_student_names(chain: Config) -> None:
    """Wrong: a student receives the rows of another teacher, or rows of a domain that no student
    has are published."""
    for student, teacher in (("feed", "feed_fm"), ("search", "fm"), ("feed_fm", "fm")):
        assert_served_with(
            chain, student, chain.folder / "snapshots" / teacher / f"version={WINDOWS:03d}"
        )
    for teacher, domains in (("fm", {"feed", "search"}), ("feed_fm", {"feed"})):
        for window in range(1, WINDOWS):
            manifest = SharedStore(chain.folder / "shared", teacher).manifest(window)
            assert (manifest.snapshot, set(manifest.domains), manifest.momentum) == (
                window,
                domains,
                True,
            )


def taught_by_another_run(
    chain: Config,
    name: str,
    **vm: Any,
) -> Config:
    """A run whose student is taught by the FM of the run `chain`."""
    student = {"name": "feed", "domain": "feed", "task": "click", "teacher": "fm"}
    settings = {
        "fm": {"name": "own"},
        "teachers": [{"name": "fm", "run": chain.folder}],
        "vm": {"arms": ["labels+share"], "models": [student], **vm},
    }
    return small_config(chain.run.dir, name, **settings)


def test_rows_of_another_runs_fm(groups: dict[int, Workers], chain: Config) -> None:
    """Wrong: rows of another run's FM are missed, are those of this run's FM, or come without
    the published optimizer state."""
    config = taught_by_another_run(chain, "elsewhere")
    config = config.model_copy(
        update={"distillation": DistillationConfig(share=ShareConfig(optimizer="teacher"))}
    )
    stream = prepare_stream(config)
    groups[1].run(score, config, 1)
    groups[1].run(train, vm_jobs(config)[0], stream.windows(), None)
    assert_served_with(config, "feed", chain.folder / "snapshots" / "fm" / f"version={WINDOWS:03d}")


def test_incompatible_rows_of_another_runs_fm_are_reported(chain: Config) -> None:
    """Wrong: rows of another width, or of ids with another hash, are detected after hours or
    never."""
    schema = EventStream.open(chain.folder / "stream").schema
    with pytest.raises(
        UserError,
        match=(
            "'feed' shares table 'user', whose rows have 4 numbers in teacher 'fm' and 8 in the "
            "student"
        ),
    ):
        check_models(
            taught_by_another_run(chain, "wide", model={"type": "mlp", "dim": 8, "mlp": [8]}),
            schema,
        )
    features = schema.model_dump()["features"]
    hashed = {**features[0], "rows": 77}
    other_hash = (
        "it maps the ids of 'user' differently .index into 301 rows of table 'user', "
        "here index into 77 rows"
    )
    changes = {
        other_hash: [hashed, *features[1:]],
        "it has no feature 'town'": [*features, {"name": "town", "rows": 5}],
    }
    for difference, other_features in changes.items():
        other = Schema.model_validate(schema.model_dump() | {"features": other_features})
        message = (
            "version=001: this snapshot was trained on another schema than the stream's: "
            f"{difference}"
        )
        with pytest.raises(UserError, match=message):
            check_models(taught_by_another_run(chain, "other"), other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers": [{"name": "fm"}]}, "two teachers are named 'fm'"),
        (
            {"teachers": [{"name": "nobody"}]},
            "no vertical model of this name has a `published_arm`",
        ),
        (
            {
                "vm": {
                    "arms": ["labels", "ah+history"],
                    "models": [CHAIN["vm"]["models"][0] | {"published_arm": "ah+history"}],
                }
            },
            r"publishes arm 'ah\+history', whose predictions need each user's history",
        ),
        ({"teachers": []}, "teacher 'feed_fm' is not one of fm"),
        ({"vm": {"arms": ["labels"]}}, "publishes arm 'ah', which is not in vm.arms"),
        (
            {"vm": {"models": [CHAIN["vm"]["models"][0] | {"teacher": "feed_fm"}]}},
            "would learn from itself: feed_fm <- feed_fm",
        ),
    ],
)
def test_invalid_settings_are_rejected(
    chain: Config,
    change: dict[str, Any],
    message: str,
) -> None:
    """Wrong: a teacher that does not exist, or that waits for itself, is reported after minutes or
    never."""
    with pytest.raises(ValidationError, match=message):
        small_config(chain.run.dir, "wrong", **merged(CHAIN, change))
