"""The study of shared tables: it can be resumed after a kill, and its controls are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray
from local_runs import score, train
from small_runs import WINDOWS, small_config
from workers import Workers

from exfm_ray.config.checks import with_settings
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.stores.shared_rows import SharedStore
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.stores.user_history import history_store
from exfm_ray.training.job import Job
from studies.parts import Part, Parts
from studies.shared_tables import teachers
from studies.shared_tables.trainings import (
    GRID,
    HOLDOUT,
    VALIDATION,
    Variant,
    holdout_figures,
    variants,
)


@pytest.mark.usefixtures("cluster")
def test_parts_that_are_kept_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong: a killed study starts over, a part gets another's result, or the first failed part
    ends it."""
    started: list[int] = []

    def doubled(number: int) -> list[int]:
        if number < 0:
            raise ValueError("negative")
        return [number, 2 * number]

    run = ray.remote(num_cpus=1)(doubled)

    def part(number: int) -> Part:
        def start() -> object:
            started.append(number)
            return run.remote(number)

        return Part(f"parts/{number}", "double", start)

    first = Parts(tmp_path, 2)
    assert first.finish("doubles", [part(number) for number in (3, -1)]) == {"parts/3": [3, 6]}
    assert list(first.failed) == ["parts/-1"] and "negative" in first.failed["parts/-1"]
    started.clear()
    assert Parts(tmp_path, 2).finish("doubles", [part(number) for number in (3, 4)]) == {
        "parts/3": [3, 6],
        "parts/4": [4, 8],
    }
    assert started == [4]
    assert Parts(tmp_path, 2).kept("parts/4", lambda: 1 / 0) == [4, 8]
    assert "doubles: 1 of 2 parts are finished" in capsys.readouterr().out


def test_permuted_rows_are_anothers(
    groups: dict[int, Workers],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: the control keeps most ids' own rows, an id's source changes between windows, or
    rows are of a snapshot that may not be used."""
    config = small_config(
        tmp_path, "run", vm={"arms": ["labels", "labels+share"]}, das={"keep_snapshots": True}
    )
    stream = prepare_stream(config)
    groups[1].run(train, Job("fm", config), stream.windows(), None)
    groups[1].run(score, config)
    monkeypatch.setattr(teachers, "WINDOWS", range(WINDOWS))
    teachers.permute_rows(config, tmp_path / "permuted", stream)
    own, other = (
        SharedStore(folder / "shared", config.fm.name)
        for folder in (config.folder, tmp_path / "permuted")
    )
    policy = SnapshotPolicy.from_config(config.das)
    snapshots = SnapshotStore.from_config(config, config.fm.name)
    anothers: dict[tuple[str, int], int] = {}
    for window in (window for window in stream.windows() if own.has(window)):
        tables = snapshots.load(own.manifest(window).snapshot, stream.schema.digest)[
            0
        ].tables.tables()
        for domain in own.manifest(window).domains:
            mixed = other.read(window, domain, stream.schema, policy)
            for name, rows in own.read(window, domain, stream.schema, policy).items():
                assert np.array_equal(mixed[name].id_X, rows.id_X)
                for number, row in zip(mixed[name].id_X, mixed[name].row_XW, strict=True):
                    (whose,) = np.flatnonzero((tables[name] == row).all(dim=1).numpy())
                    assert anothers.setdefault((name, int(number)), int(whose)) == whose
    moved = [number != whose for (_, number), whose in anothers.items()]
    assert len(moved) > 50 and np.mean(moved) > 0.9


def test_mixed_users_have_anothers_past(
    groups: dict[int, Workers],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: users keep their own past, its source changes between windows, or more or fewer
    users are known than without the control."""
    config = small_config(
        tmp_path,
        "run",
        vm={"arms": ["labels", "labels+history"]},
        distillation={"history": {"dim": 4}},
    )
    stream = prepare_stream(config)
    groups[1].run(train, Job("fm", config), stream.windows(), None)
    groups[1].run(score, config)
    mixed = with_settings(config, {"name": "mixed"})
    monkeypatch.setattr(teachers, "WINDOWS", range(WINDOWS))
    teachers.mix_users(config, mixed)
    own = history_store(config)
    other = history_store(mixed)
    assert own and other
    whose: dict[int, int] = {}
    for window in range(2, WINDOWS + 1):
        store = own.state_before(window, stream.schema)
        renamed = other.state_before(window, stream.schema)
        np.testing.assert_array_equal(store.users_U, renamed.users_U)
        past = {
            tuple(row): user
            for user, row in zip(store.users_U.tolist(), store.total_UD.tolist(), strict=True)
        }
        found = {
            user: past[tuple(row)]
            for user, row in zip(renamed.users_U.tolist(), renamed.total_UD.tolist(), strict=True)
        }
        assert whose.items() <= found.items()
        whose = found
    assert (
        sorted(whose.values()) == sorted(whose)
        and np.mean([user == its for user, its in whose.items()]) < 0.1
    )


def rows(ne: float, windows: range) -> list[dict[str, float]]:
    """Rows of metrics: half of the labels are 1, and the log loss is `ne` times that of the mean
    label."""
    return [
        {
            "window": w,
            "examples": 100,
            "label_rate": 0.5,
            "log_loss": ne * np.log(2),
            "calibration": 1.0,
        }
        for w in windows
    ]


def test_settings_are_chosen_and_judged_on_other_windows() -> None:
    """Wrong: settings are chosen on the holdout windows, controls choose their own, or a failed
    variant takes the others with it."""
    better_late = [[*rows(0.95, VALIDATION), *rows(0.5, HOLDOUT)] for _ in GRID]
    better_late[3] = [*rows(0.9, VALIDATION), *rows(0.99, HOLDOUT)]
    labels = [
        [*rows(0.8 + 0.01 * number, VALIDATION), *rows(1.0 + 0.01 * number, HOLDOUT)]
        for number in range(len(GRID))
    ]
    wanted = [
        Variant("labels", "labels", {}),
        Variant("kd", "kd", {}),
        Variant("labels as kd", "labels", {}, "", "kd"),
        Variant("ah", "ah", {}),
    ]
    told = holdout_figures(
        wanted, {"labels": {0: labels}, "kd": {0: better_late}}, {0: rows(0.9, HOLDOUT)}
    )
    assert sorted(told) == ["kd", "labels", "labels as kd"]
    assert told["kd"]["settings"] == told["labels as kd"]["settings"] == GRID[3]
    (kd,), (control,) = told["kd"]["seeds"], told["labels as kd"]["seeds"]
    assert (
        kd["ne"] == pytest.approx(0.99)
        and kd["ne_gain"] == pytest.approx(0.01)
        and kd["transfer_ratio"] == pytest.approx(0.1)
    )
    assert control["ne_gain"] == pytest.approx(-0.03)


def test_each_variant_has_a_training_of_its_own() -> None:
    """Wrong: the file of one training is read as another's."""
    wanted = variants()
    assert len({variant.name for variant in wanted}) == len(wanted)
    trained = {
        variant.training: (variant.arm, tuple(variant.settings.items()), variant.rows)
        for variant in wanted
    }
    assert len(set(trained.values())) == len(trained) and all("/" not in name for name in trained)
