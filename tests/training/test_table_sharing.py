"""Arms with +share on whole runs: their tables when a window is evaluated, rules 1 and 2, resuming,
what is served."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from local_runs import LocalReport, run_locally, score, train
from small_runs import WINDOWS, assert_close, figures, flip_labels, metrics, rewrite, small_config
from whole_student import WORKERS_TOLERANCE, Whole
from workers import Workers

from exfm_ray.config.checks import with_settings
from exfm_ray.config.root import Config
from exfm_ray.data.stream import EventStream, list_values, window_name
from exfm_ray.errors import UserError
from exfm_ray.models.serialization import load_model
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.training.checkpoint import BEGINNING
from exfm_ray.training.job import Job
from exfm_ray.training.local import LocalClient
from exfm_ray.training.table_sharing import TableSharing
from exfm_ray.training.worker import Worker, build_groups

ARMS = ["labels", "labels+share", "ah_sa+share"]
WIDE = {
    "model": {
        "type": "wukong",
        "dim": 8,
        "l": 1,
        "n_F": 2,
        "n_L": 2,
        "k": 2,
        "fmb_mlp": [8],
        "mlp": [8],
    }
}
VARIANTS: dict[str, dict[str, Any]] = {
    "replace": {},
    "unseen": {"share": {"mode": "unseen", "min_uses": 5, "optimizer": "teacher"}},
    "average": {"share": {"mode": "average", "weight": 0.25}, "vm": {"arms": ["labels+share"]}},
    "wide": {
        "share": {"projection": "principal", "optimizer": "teacher"},
        "fm": WIDE,
        "vm": {"arms": ["labels+share"]},
    },
}


def config_of(
    folder: Path,
    name: str,
    share: dict[str, Any] | None = None,
    **changes: Any,
) -> Config:
    vm = {"arms": ARMS} | changes.pop("vm", {})
    return small_config(folder, name, vm=vm, distillation={"share": share or {}}, **changes)


@pytest.fixture(scope="module")
def whole(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Undisturbed runs on one worker, each run once."""
    folder = tmp_path_factory.mktemp("sharing")

    @cache
    def run(variant: str) -> Config:
        config = config_of(folder, variant, **VARIANTS[variant])
        run_locally(groups, config)
        return config

    return run


@pytest.fixture
def base(whole: Whole) -> Config:
    """The run with default settings."""
    return whole("replace")


def tables_at(job: Job, windows: list[int]) -> list[dict[str, Any]]:
    """This worker's shards of every trainer before and after rows are written for a window."""
    worker = Worker(
        job, None, LocalReport(job.config.folder / "other.jsonl", job.name), torch.device("cpu")
    )
    worker.loop.client = LocalClient(worker.loop.reader, job.passes(windows, BEGINNING))  # type: ignore[assignment]
    seen: list[dict[str, Any]] = []

    def shards() -> dict[str, Any]:
        return {
            f"{trainer.name}/{shard.table}@{shard.first_row}": shard.weight_RW.numpy().copy()
            for trainer in worker.loop.trainers
            for shard in trainer.engine.tables.shards()
        }

    for group in worker.loop.groups:
        begin = group.begin_window

        def watched(window: int, begin: Any = begin) -> None:
            before = shards()
            begin(window)
            seen.append({"window": window, "before": before, "after": shards()})

        group.begin_window = watched  # type: ignore[method-assign]
    for window in windows:
        worker.loop.run(window)
    return seen


def ids_of(
    config: Config,
    window: int,
    domain: str,
) -> dict[str, set[int]]:
    stream = EventStream.open(config.folder / "stream")
    found: dict[str, set[int]] = {name: set() for name in stream.schema.tables}
    for fragment in stream.window(window).fragments:
        table = stream.read(window, fragment)
        mine = np.flatnonzero(table["domain"].to_numpy() == stream.schema.domain_index(domain))
        for column, feature in enumerate(stream.schema.single):
            found[feature.table or feature.name] |= set(
                list_values(table["sparse"], len(stream.schema.single))[mine, column].tolist()
            )
        for bag in stream.schema.bags:
            found[bag.table or bag.name] |= {
                value for row in mine.tolist() for value in table[bag.name][row].as_py()
            }
    return found


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
@pytest.mark.parametrize("workers", [1, 2])
def test_tables_hold_the_snapshots_rows_when_a_window_is_evaluated(
    base: Config,
    groups: dict[int, Workers],
    workers: int,
    sharding: str,
) -> None:
    """Wrong: a window is evaluated without the rows of the snapshot that supervises it; rows of
    other ids or of arms that share nothing change; a worker writes another worker's rows."""
    config = config_of(base.run.dir, base.name, vm={"workers": workers, "sharding": sharding})
    (job,) = vm_jobs(config)
    domains = [student.domain for student in config.vm.models]
    written = 0
    for seen in groups[workers].run(tables_at, job, list(range(WINDOWS))):
        for position, at in enumerate(seen):
            student = config.vm.models[position % len(domains)]
            ids = ids_of(config, at["window"], student.domain)
            teacher = (
                load_model(config.folder / "snapshots" / "fm" / f"version={at['window']:03d}")[
                    0
                ].tables.tables()
                if at["window"]
                else {}
            )
            for key, after in at["after"].items():
                trainer, _, shard = key.partition("/")
                table, _, first = shard.partition("@")
                expected = at["before"][key].copy()
                start = int(first)
                local_ids: list[int] = []
                if trainer.startswith(f"{student.name}-"):
                    local_ids = [i for i in ids[table] if start <= i < start + len(after)]
                if trainer.endswith("+share") and teacher and local_ids:
                    expected[np.array(local_ids) - start] = teacher[table].numpy()[local_ids]
                    written += len(local_ids)
                np.testing.assert_array_equal(after, expected, err_msg=key)
    assert written > 1000


def moved_by_a_step(config: Config) -> dict[str, float]:
    """How far a step on the same 32 examples moves the rows of the table `ad`, by arm."""
    stream = EventStream.open(config.folder / "stream")
    group = build_groups(
        Job("vm", config, config.vm.models[:1]), stream.schema, torch.device("cpu")
    )[0]
    weights = {}
    for trainer in group.trainers:
        tables = {shard.table: shard.weight_RW for shard in trainer.engine.tables.shards()}
        weights[str(trainer.arm)] = tables["ad"]
    before = {arm: weight_RW.clone() for arm, weight_RW in weights.items()}
    rows = stream.read(0, stream.window(0).fragments[0])
    feed_rows = rows.filter(pc.equal(rows["domain"], stream.schema.domain_index("feed")))
    group.learn(feed_rows.slice(0, 32))
    return {arm: float((weight_RW - before[arm]).norm()) for arm, weight_RW in weights.items()}


def test_shared_tables_learn_at_their_own_rate(base: Config, groups: dict[int, Workers]) -> None:
    """Wrong: the teacher's rows are trained at the rate of fresh ones, which undoes them; or plain
    arms learn at the rate of shared tables."""
    config = with_settings(
        base,
        {
            "vm.optimizer.table_lr": 0.05,
            "distillation.share.table_lr": 0.0004,
            "vm.arms": ["labels", "labels+share"],
        },
    )
    (moved,) = groups[1].run(moved_by_a_step, config)
    # The first step of Adagrad moves each row by the rate, whatever its gradient; the first
    # gradients of both arms are equal.
    assert moved["labels"] > 0.05
    assert moved["labels+share"] / moved["labels"] == pytest.approx(0.0004 / 0.05, rel=1e-3)


@pytest.mark.parametrize("variant", ["replace", "unseen", "wide"])
def test_two_workers_equal_one(
    whole: Whole,
    groups: dict[int, Workers],
    tmp_path: Path,
    variant: str,
) -> None:
    """Wrong: the number of workers changes the written rows, their optimizer state, their
    projection or which rows count as unseen."""
    one = whole(variant)
    # With few rows some principal directions are arbitrary, and the last bits of an FM on two
    # workers decide them.
    config = with_settings(
        one,
        {"run.dir": str(tmp_path), "vm.workers": 2, "fm.workers": 1 if variant == "wide" else 2},
    )
    run_locally(groups, config)
    assert metrics(config).keys() == metrics(one).keys()
    assert_close(
        list(metrics(config).values()),
        [metrics(one)[key] for key in metrics(config)],
        WORKERS_TOLERANCE,
    )


def test_sharing_reaches_its_arms_only(
    base: Config,
    groups: dict[int, Workers],
    tmp_path: Path,
) -> None:
    """Wrong: rows are written into a plain arm, or not into one with +share; or a row of metrics
    names another snapshot."""
    plain = small_config(tmp_path, "plain", vm={"arms": ["labels"]})
    run_locally(groups, plain)
    for key, row in metrics(plain).items():
        if row["role"] == "vm":
            assert metrics(base)[key] == row
    for row in metrics(base).values():
        if row["role"] == "vm":
            known = row["window"] if row["arm"].endswith("+share") and row["window"] else None
            assert row["snapshot"] == known
            same = next(
                r
                for r in metrics(base).values()
                if r["arm"] == "labels"
                and all(r[k] == row[k] for k in ("window", "model", "domain"))
            )
            assert (row["log_loss"] == same["log_loss"]) == (
                row["arm"] == "labels" or row["window"] == 0
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumes_after_a_kill(
    whole: Whole,
    groups: dict[int, Workers],
    tmp_path: Path,
    variant: str,
) -> None:
    """Wrong: a run killed between a window's figures and its checkpoint, or between two batches,
    has other results than an undisturbed one."""
    undisturbed = whole(variant)
    killed = with_settings(
        undisturbed, {"run.dir": str(tmp_path), "checkpoint.every_examples": 150}
    )
    prepare_stream(killed)
    windows = list(range(WINDOWS))
    groups[1].run(train, Job("fm", killed), windows, None)
    groups[1].run(score, killed)
    (job,) = vm_jobs(killed)
    for dies_at, batches in ((1, None), (2, 5)):
        groups[1].run(train, job, windows, dies_at, batches)
    assert job.checkpoints.latest().windows == 2 and job.checkpoints.latest().examples >= 150, (
        "inside the window"
    )
    run_locally(groups, killed)
    assert metrics(killed) == metrics(undisturbed)
    assert figures(killed) == figures(undisturbed)
    for file in sorted((undisturbed.folder / "exported").rglob("*.safetensors")):
        assert (
            killed.folder / file.relative_to(undisturbed.folder)
        ).read_bytes() == file.read_bytes(), file


def test_a_followed_run_equals_a_whole_one(groups: dict[int, Workers], tmp_path: Path) -> None:
    """Wrong: rows that are written for an export stay in the model that learns further windows."""
    whole, followed = (
        config_of(tmp_path, name, {"mode": "average"}, vm={"arms": ["kd+share"]})
        for name in ("whole", "followed")
    )
    run_locally(groups, whole)
    prepare_stream(followed)
    windows = list(range(WINDOWS))
    groups[1].run(train, Job("fm", followed), windows, None)
    groups[1].run(score, followed)
    (job,) = vm_jobs(followed)
    for available in (1, 2, WINDOWS):
        groups[1].run(train, job, windows[:available], None)
    assert metrics(followed) == metrics(whole)
    for file in sorted((whole.folder / "exported").rglob("*.safetensors")):
        assert (
            followed.folder / file.relative_to(whole.folder)
        ).read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize("lag", [1, 2])
def test_shared_rows_do_not_depend_on_later_labels(
    groups: dict[int, Workers],
    tmp_path: Path,
    lag: int,
) -> None:
    """Wrong: the teacher's rows for a window depend on labels of that window or later ones (rule
    2)."""
    changed_at = 2
    as_is, changed = (
        config_of(tmp_path, name, das={"fm_lag": lag}) for name in ("as_is", "changed")
    )
    stream = prepare_stream(changed)
    for window in range(changed_at, WINDOWS):
        rewrite(stream, window, flip_labels)
    for config in (as_is, changed):
        run_locally(groups, config)
    for window in range(lag, WINDOWS):
        files = [
            sorted((c.folder / "shared" / "fm" / window_name(window)).iterdir())
            for c in (as_is, changed)
        ]
        assert [path.name for path in files[0]] == [
            "feed.safetensors",
            "manifest.json",
            "stories.safetensors",
        ]
        equal = [one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True)]
        assert all(equal) if window < changed_at + lag else not any(equal), window
    both_metrics = [
        {k: r for k, r in metrics(c).items() if r["window"] <= changed_at and r["model"] == "feed"}
        for c in (as_is, changed)
    ]
    for key, row in both_metrics[0].items():  # mean prediction, in which the labels cancel out
        means = [rows[key]["calibration"] * rows[key]["label_rate"] for rows in both_metrics]
        np.testing.assert_allclose(means[1], means[0], rtol=1e-12, err_msg=str((key, row)))


def test_served_models_hold_the_newest_rows(base: Config) -> None:
    """Wrong: a student is served with older rows than those of its figures, or one that shares
    nothing has the teacher's rows."""
    teacher = load_model(base.folder / "snapshots" / "fm" / f"version={WINDOWS:03d}")[
        0
    ].tables.tables()
    for arm in ARMS:
        model, manifest = load_model(base.folder / "exported" / f"feed-{arm}")
        assert manifest.facts["arm"] == arm
        equal = [
            np.array_equal(table.numpy(), teacher[name].numpy())
            for name, table in model.tables.tables().items()
        ]
        assert all(equal) if arm.endswith("+share") else not any(equal)


def test_serving_is_the_same_as_without(base: Config) -> None:
    """Wrong: sharing changes the served graph or its size (rule 6)."""
    sizes = {
        arm: {
            p.name: p.stat().st_size
            for p in (base.folder / "exported" / f"feed-{arm}").glob("*.safetensors")
        }
        for arm in ARMS
    }
    assert sizes["labels"] == sizes["labels+share"] == sizes["ah_sa+share"]


def test_modes_differ(
    base: Config,
    groups: dict[int, Workers],
    tmp_path: Path,
) -> None:
    """Wrong: a setting does not reach the tables."""
    found = {"replace": metrics(base)}
    for name, share in {
        "average": {"mode": "average", "weight": 0.25},
        "all_of_it": {"mode": "average", "weight": 1.0},
        "unseen": {"mode": "unseen"},
        "always_unseen": {"mode": "unseen", "min_uses": 10**6},
        "reset": {"optimizer": "reset"},
        "teacher": {"optimizer": "teacher"},
        "one_table": {"tables": ["user"]},
    }.items():
        config = config_of(
            tmp_path,
            name,
            share,
            vm={"arms": ["labels+share"], "models": [base.vm.models[0].model_dump(mode="json")]},
        )
        run_locally(groups, config)
        found[name] = metrics(config)
    key = next(
        key
        for key, row in found["replace"].items()
        if (row["model"], row["arm"], row["window"]) == ("feed", "labels+share", WINDOWS - 1)
    )
    ne = {name: rows[key]["ne"] for name, rows in found.items()}
    assert ne["all_of_it"] == ne["always_unseen"] == ne["replace"]
    different = [value for name, value in ne.items() if name not in ("all_of_it", "always_unseen")]
    assert len(set(different)) == len(different), ne


def test_rows_of_another_width_are_projected(whole: Whole) -> None:
    """Wrong: rows of 8 numbers are cut or misplaced in tables of 4, or a map does not have the FM's
    principal directions."""
    config = whole("wide")
    teacher = load_model(config.folder / "snapshots" / "fm" / f"version={WINDOWS:03d}")[
        0
    ].tables.tables()
    first = load_model(config.folder / "snapshots" / "fm" / "version=001")[0].tables.tables()
    served = load_model(config.folder / "exported" / "feed-labels+share")[0].tables.tables()
    for name, ids in ids_of(config, 1, "feed").items():
        if len(ids) <= 8:  # with so few rows some directions are arbitrary
            continue
        _, _, vt = np.linalg.svd(
            first[name].numpy()[sorted(ids)].astype(np.float64), full_matrices=True
        )
        low = vt[:4].T * np.sign(vt[:4].T[np.abs(vt[:4]).argmax(1), range(4)])
        # float32 rows; eigenvectors are less certain if two singular values are close
        np.testing.assert_allclose(
            served[name].numpy(), teacher[name].numpy() @ low, rtol=1e-3, atol=1e-4, err_msg=name
        )


def test_rows_are_not_projected_without_the_setting(whole: Whole) -> None:
    """Wrong: rows of a teacher that published after the config was checked are projected, although
    projection is none."""
    config = with_settings(whole("wide"), {"distillation.share.projection": "none"})
    sharing = TableSharing.from_config(
        config, config.vm.models[0], EventStream.open(config.folder / "stream").schema
    )
    assert sharing
    for rows in (lambda: sharing.rows(1), lambda: list(sharing.rows_after(1))):
        with pytest.raises(
            UserError,
            match="'feed' shares table '.*', whose rows have 8 numbers in the FM and 4 in the "
            "student; set .*=principal",
        ):
            rows()


def test_unpublished_optimizer_state_is_reported(
    base: Config,
    groups: dict[int, Workers],
    tmp_path: Path,
) -> None:
    """Wrong: rows are written with an optimizer state that was never published."""
    config = config_of(tmp_path, "bare", {"optimizer": "teacher"}, vm={"arms": ["labels+share"]})
    plain = config_of(tmp_path, "bare", vm={"arms": ["labels"]})
    prepare_stream(plain)
    groups[1].run(train, Job("fm", plain), [0, 1, 2, 3], None)
    groups[1].run(score, config)
    with pytest.raises(
        AssertionError,
        match=r"UserError: .*without optimizer state, which "
        "distillation.share.optimizer=teacher needs",
    ):
        groups[1].run(train, vm_jobs(config)[0], [0, 1], None)
