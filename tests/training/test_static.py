"""Passes over a static set: what is learned, which pass is chosen, when training stops."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_runs import DiedError, LocalReport
from small_runs import assert_close, flip_labels, rewrite, small_config
from workers import Workers

from exfm_ray.config.checks import with_settings
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StaticConfig
from exfm_ray.data.batch import to_batch
from exfm_ray.data.readers import ShuffledReader, WindowPass
from exfm_ray.data.stream import EventStream, list_values
from exfm_ray.errors import UserError
from exfm_ray.metrics.state import MetricState
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.runner import PipelineRunner
from exfm_ray.pipeline.schedule import Role
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.tracking.recorder import read_metrics
from exfm_ray.training.checkpoint import Cursor
from exfm_ray.training.job import Job
from exfm_ray.training.local import LocalClient
from exfm_ray.training.static import EarlyStopping, StaticSet
from exfm_ray.training.worker import Worker

VALIDATION = 2
TEST = 3
MODEL = {
    "type": "wukong",
    "dim": 4,
    "l": 1,
    "n_F": 2,
    "n_L": 2,
    "k": 2,
    "fmb_mlp": [8],
    "mlp": [8],
    "dropout": 0.1,
}


def static_config(
    folder: Path,
    name: str,
    **fm: Any,
) -> Config:
    """Learn windows 0 and 1 of the tiny stream, validate on 2, test on 3.

    Dropout and the moving average are on.
    """
    settings = {
        "model": MODEL,
        "optimizer": {"ema": 0.9},
        "static": {
            "passes": 3,
            "patience": 2,
            "monitor": "log_loss",
            "validation_window": VALIDATION,
        },
        **fm,
    }
    return small_config(folder, name, fm=settings, vm={"models": []})


class DyingReport(LocalReport):
    """Raises an error instead of writing the figures of pass `dies_at`."""

    dies_at: int = 0

    def metrics(self, rows: Any) -> None:
        if rows[0]["pass"] == self.dies_at:
            raise RuntimeError("killed")
        super().metrics(rows)


def train(
    job: Job,
    windows: list[int],
    dies_at: int,
) -> None:
    """Run a worker's part of the job from its latest checkpoint."""
    done = job.checkpoints.latest()
    report = DyingReport(job.config.folder / "metrics.jsonl", job.name)
    report.dies_at = dies_at
    worker = Worker(
        job, None, report if torch.distributed.get_rank() == 0 else None, torch.device("cpu")
    )
    worker.loop.client = LocalClient(worker.loop.reader, job.passes(windows, done))  # type: ignore[assignment]
    worker.run(windows, done)


def run(
    groups: dict[int, Workers],
    config: Config,
    dies_at: int = 0,
) -> list[dict[str, Any]]:
    """Train to the end; return the rows of metrics.jsonl without their speed."""
    stream = prepare_stream(config)
    groups[config.fm.workers].run(train, Job("fm", config), stream.windows(), dies_at)
    return [
        {k: v for k, v in row.items() if k != "examples_per_s"}
        for row in read_metrics(config.folder / "metrics.jsonl")
    ]


def published(config: Config) -> SnapshotStore:
    return SnapshotStore(config.folder / "snapshots", "fm")


def weights(config: Config) -> dict[str, torch.Tensor]:
    """The weights of the only published snapshot."""
    store = published(config)
    (version,) = store.versions()
    return store.load(version, EventStream.open(config.folder / "stream").schema.digest)[
        0
    ].state_dict()


@pytest.fixture(scope="module")
def base(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = static_config(tmp_path_factory.mktemp("static"), "base")
    run(groups, config)
    return config


def test_each_pass_is_evaluated_on_the_held_out_windows(base: Config) -> None:
    """Wrong: a training window is evaluated, a pass has no figures, or a row has no pass."""
    rows = read_metrics(base.folder / "metrics.jsonl")
    passes = Job("fm", base).checkpoints.latest().windows
    found = {(row["pass"], row["window"]) for row in rows}
    assert found == {
        (number, window) for number in range(1, passes + 1) for window in (VALIDATION, TEST)
    }
    (timing,) = {t.examples for t in Job("fm", base).checkpoints.result(Cursor(passes)).timings}
    assert timing == 2 * 900


def test_the_best_pass_is_published_and_summed_up(base: Config) -> None:
    """Wrong: the last pass is published instead of the best, or the summary has the figures of
    another pass or of the raw weights."""
    rows = [row for row in read_metrics(base.folder / "metrics.jsonl") if row["domain"] == "all"]
    losses = {
        n: np.mean([r["log_loss"] for r in rows if (r["pass"], r["window"]) == (n, VALIDATION)])
        for n in {row["pass"] for row in rows}
    }
    best = min(losses, key=lambda number: losses[number])
    store = published(base)
    stream = EventStream.open(base.folder / "stream")
    assert store.versions() == [best]
    figures = PipelineRunner(base, stream).summarize()["figures"]
    assert {row["pass"] for row in figures} == {best} and {row["window"] for row in figures} == {
        VALIDATION,
        TEST,
    }
    model, tasks = store.load(best, stream.schema.digest)
    for window in (VALIDATION, TEST):
        tables = [stream.read(window, fragment) for fragment in stream.window(window).fragments]
        p_NT = np.concatenate(
            [model.score(to_batch(table, stream.schema)).numpy() for table in tables]
        ).astype(np.float64)
        labels_NT = np.concatenate([list_values(table["labels"], len(tasks)) for table in tables])
        for i, task in enumerate(tasks):
            state = MetricState.from_logits(np.log(p_NT[:, i] / (1 - p_NT[:, i])), labels_NT[:, i])
            (row,) = (
                r for r in figures if (r["window"], r["domain"], r["task"]) == (window, "all", task)
            )
            assert state.figures()["log_loss"] == pytest.approx(row["log_loss"], rel=1e-5)


def test_the_tests_choose_nothing(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: the test window is learned or influences the best pass, so flipping its labels changes
    the weights."""
    config = static_config(tmp_path, "flipped")
    rewrite(prepare_stream(config), TEST, flip_labels)
    rows = run(groups, config)
    assert published(config).versions() == published(base).versions()
    for name, tensor in weights(base).items():
        assert torch.equal(tensor, weights(config)[name]), name
    before = [
        row
        for row in read_metrics(base.folder / "metrics.jsonl")
        if row["window"] == TEST and row["domain"] == "all"
    ]
    after = [row for row in rows if row["window"] == TEST and row["domain"] == "all"]
    pairs = zip(before, after, strict=True)
    assert all(old["log_loss"] != new["log_loss"] for old, new in pairs)


def test_a_killed_run_resumes_as_if_undisturbed(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: a resumed run learns a pass twice, or loses the moving average, the dropout's random
    state or the best pass."""
    config = static_config(tmp_path, "killed")
    with pytest.raises(AssertionError, match="killed"):
        run(groups, config, dies_at=3)
    assert Job("fm", config).checkpoints.latest() == Cursor(2) and not Job("fm", config).finished(
        []
    )
    rows = run(groups, config)
    assert_close(
        rows,
        [
            {k: v for k, v in r.items() if k != "examples_per_s"}
            for r in read_metrics(base.folder / "metrics.jsonl")
        ],
        0,
    )
    assert Job("fm", config).finished([])
    for name, tensor in weights(base).items():
        assert torch.equal(tensor, weights(config)[name]), name


def test_two_workers_make_the_same_choice(groups: dict[int, Workers], tmp_path: Path) -> None:
    """Wrong: workers shuffle differently or disagree on when to stop.

    Dropout is off because its masks depend on the workers' rows.
    """
    model = MODEL | {"dropout": 0.0}
    found = []
    for workers in (1, 2):
        rows = run(
            groups, static_config(tmp_path, f"workers{workers}", workers=workers, model=model)
        )
        # The first averages are nearly constant. Rounding changes the order of logits, which moves
        # AUC with only ten positives.
        found.append(
            [
                {key: value for key, value in row.items() if key not in ("auc", "gauc")}
                for row in rows
            ]
        )
    assert_close(found[1], found[0], 1e-3)  # float32 sums in another order


@pytest.mark.parametrize("monitor", ["auc", "log_loss"])
def test_early_stopping(monitor: Any) -> None:
    """Wrong: the direction of a figure is reversed, patience is miscounted, or other windows and
    domains have an influence."""
    stopping = EarlyStopping(
        StaticConfig(passes=9, patience=2, monitor=monitor, validation_window=1)
    )
    sign = 1 if monitor == "auc" else -1
    improved = []
    for value in (0.5, 0.7, 0.6, 0.8, 0.8, 0.7):
        assert not stopping.over
        rows = [{"window": 1, "domain": "all", monitor: sign * value}]
        rows += [
            {"window": 2, "domain": "all", monitor: sign * 99},
            {"window": 1, "domain": "feed", monitor: sign * 99},
        ]
        improved.append(stopping.take(rows))
    assert improved == [True, True, False, True, False, False]
    assert (stopping.best, stopping.last, stopping.over) == (4, 6, True)
    assert EarlyStopping.restore(stopping.config, stopping.state()) == stopping


def test_an_undefined_figure_is_worse_than_any() -> None:
    """Wrong: a first pass without a figure (labels of one class) stays the best, or its state does
    not survive a checkpoint."""
    stopping = EarlyStopping(StaticConfig(passes=9, patience=3, monitor="auc", validation_window=1))
    improved = []
    for value in (None, None, 0.6, None, 0.5, 0.7):
        stopping = EarlyStopping.restore(
            stopping.config, json.loads(json.dumps(stopping.state(), allow_nan=False))
        )
        improved.append(stopping.take([{"window": 1, "domain": "all", "auc": value}]))
    assert improved == [True, False, True, False, False, True] and (
        stopping.best,
        stopping.value,
    ) == (6, 0.7)


def test_a_run_killed_in_its_first_pass_resumes(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: the state of early stopping before the first pass cannot be stored in a checkpoint."""
    config = with_settings(static_config(tmp_path, "killed"), {"checkpoint.every_examples": 500})
    with pytest.raises(AssertionError, match="killed"):
        run(groups, config, dies_at=1)
    mark = Job("fm", config).checkpoints.latest()
    assert mark.windows == 0 and mark.examples
    rows = run(groups, config)
    assert_close(
        rows,
        [
            {k: v for k, v in r.items() if k != "examples_per_s"}
            for r in read_metrics(base.folder / "metrics.jsonl")
        ],
        0,
    )


def train_and_leave(job: Job, windows: list[int]) -> None:
    """Learn, and die instead of removing the snapshot of the second last pass."""
    remove = Worker._remove_superseded

    def die(worker: Worker) -> None:
        if worker._stopping and worker._stopping.best == worker._stopping.config.passes:
            raise DiedError
        remove(worker)

    Worker._remove_superseded = die  # type: ignore[method-assign]
    try:
        with suppress(DiedError):
            train(job, windows, 0)
    finally:
        Worker._remove_superseded = remove  # type: ignore[method-assign]


def test_a_kill_leaves_no_worse_snapshot(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: a run killed between a pass's checkpoint and the removal of the superseded snapshot
    keeps both, so readers load the worse one; or it counts as finished."""
    config = static_config(tmp_path, "killed")
    windows = prepare_stream(config).windows()
    groups[1].run(train_and_leave, Job("fm", config), windows)
    assert published(config).versions() == [2, 3] and not Job("fm", config).finished(windows)
    run(groups, config)
    assert published(config).versions() == published(base).versions() == [3] and Job(
        "fm", config
    ).finished(windows)


def test_a_pass_learns_before_it_evaluates() -> None:
    """Wrong: a held-out window is learned."""
    static = StaticSet(StaticConfig(validation_window=2), (0, 1, 2, 3))
    assert static.passes(5) == [
        WindowPass(0, "learn", 5),
        WindowPass(1, "learn", 5),
        WindowPass(2, "evaluate", 5),
        WindowPass(3, "evaluate", 5),
    ]


def test_each_pass_has_its_own_order(base: Config) -> None:
    """Wrong: the shuffle loses or doubles rows, all passes have the same order, or evaluation is
    shuffled."""
    root = base.folder / "stream"
    stream = EventStream.open(root)
    reader = ShuffledReader(root, seed=1)

    def ids(window_pass: WindowPass) -> list[int]:
        values: list[int] = []
        for fragment in reader.fragments(window_pass):
            values += reader.read(window_pass, fragment)["example_id"].to_pylist()
        return values

    stream_order: list[int] = []
    for fragment in stream.window(0).fragments:
        stream_order += stream.read(0, fragment)["example_id"].to_pylist()
    first = ids(WindowPass(0, "learn", 1))
    repeated = ids(WindowPass(0, "learn", 1))
    second = ids(WindowPass(0, "learn", 2))
    assert first == repeated != second
    assert sorted(first) == sorted(second) == sorted(stream_order)
    assert first != stream_order == ids(WindowPass(0, "evaluate", 1))


def test_what_a_static_set_cannot_do_is_refused(base: Config, tmp_path: Path) -> None:
    """Wrong: a run on a static set waits forever for a DAS, or starts without a window to learn or
    to validate."""
    with pytest.raises(UserError, match="no DAS; run train-fm"):
        PipelineRunner(base, EventStream.open(base.folder / "stream")).execute(
            frozenset({Role.FM, Role.DAS})
        )
    with pytest.raises(
        ValueError, match=r"every teacher has already seen the labels; remove vm.models"
    ):
        small_config(tmp_path, "students", fm={"static": {}})
    for window in (4, 9):
        config = static_config(tmp_path, f"window{window}", static={"validation_window": window})
        with pytest.raises(
            UserError, match=rf"validation_window' is {window}, the stream has windows 0 to 3"
        ):
            PipelineRunner(config, prepare_stream(config)).execute(frozenset({Role.FM}))
