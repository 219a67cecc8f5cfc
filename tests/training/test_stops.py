"""Training on a full disk and of a model that diverges: the error, and the files that are left."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from local_runs import LocalReport, files, train, with_inputs
from small_runs import WINDOWS
from workers import Workers

from exfm_ray.config.root import Config
from exfm_ray.errors import UserError
from exfm_ray.models.serialization import load_model
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.training.checkpoint import Cursor
from exfm_ray.training.job import Job
from exfm_ray.training.local import InMemoryReport, LocalClient
from exfm_ray.training.worker import Worker


def train_on_a_full_disk(
    job: Job,
    windows: list[int],
    whole: int,
    full: str,
) -> str:
    """Learn `whole` windows, then fill the disk; return the error.

    No file may then grow beyond 4 KB, or the next checkpoint's folder cannot be created.
    """
    worker = local_worker(job, windows)
    save = worker._save
    report = worker.loop.report
    assert report

    def save_then_fill(cursor: Cursor, window: int | None) -> None:
        save(cursor, window)
        if cursor.windows == whole:
            worker.saver.finish()
            if full == "folder":
                job.checkpoints.folder(Cursor(whole + 1)).touch()
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    worker._save = save_then_fill  # type: ignore[method-assign]
    if full != "metrics":
        report.metrics = report.timeline = lambda rows: None  # type: ignore[method-assign]
    if full == "checkpoint":
        worker.publisher.publish = lambda version: None  # type: ignore[method-assign]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        worker.run(windows, job.checkpoints.latest())
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "no error"


def local_worker(job: Job, windows: list[int]) -> Worker:
    worker = Worker(
        job,
        None,
        LocalReport(job.config.folder / "logs" / "metrics.jsonl", job.name),
        torch.device("cpu"),
    )
    worker.loop.client = LocalClient(
        worker.loop.reader, job.passes(windows, job.checkpoints.latest())
    )  # type: ignore[assignment]
    return worker


@pytest.mark.parametrize(
    ("full", "named"),
    [
        ("checkpoint", "windows=003: the checkpoint"),
        ("folder", "windows=003: the checkpoint"),
        ("snapshot", "version=003: the model after window 2"),
        ("metrics", "metrics.jsonl, or timeline.jsonl beside it,"),
    ],
    ids=["checkpoint", "folder", "snapshot", "metrics"],
)
def test_a_full_disk_keeps_the_last_good_checkpoint(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
    full: str,
    named: str,
) -> None:
    """Wrong: a half-written checkpoint counts or replaces the previous one, or a full disk ends in
    a traceback only."""
    config = with_inputs(base, tmp_path, "run", vm={"models": []})
    job = Job("fm", config)
    windows = list(range(WINDOWS))
    (message,) = groups[1].run(train_on_a_full_disk, job, windows, 2, full)
    assert f"{named} could not be written (" in message
    assert "[Errno " in message or "os error" in message, message
    assert "; the last good checkpoint is" in message
    assert "windows=002. Free disk space" in message
    assert job.checkpoints.latest() == Cursor(2)
    if full == "folder":
        job.checkpoints.folder(Cursor(3)).unlink()
    if full in ("snapshot", "checkpoint"):
        groups[1].run(train, job, windows, None)
        published = files(config, "snapshots")
        assert (
            len(published) == 2 * (2 if full == "checkpoint" else WINDOWS)
            and published.items() <= files(base, "snapshots").items()
        )
        assert job.checkpoints.latest() == Cursor(WINDOWS)
    assert not list(config.folder.rglob(".*.tmp")), "a temporary file was left"


def train_to_nan(
    job: Job,
    windows: list[int],
    window: int,
    rank: int,
    what: str,
) -> str:
    """Spoil one worker's loss in batch 5 of a window, its logits, or at the window's end a weight
    or its momentum; return the error."""
    worker = Worker(job, None, None, torch.device("cpu"))
    worker.loop.client = LocalClient(
        worker.loop.reader, job.passes(windows, job.checkpoints.latest())
    )  # type: ignore[assignment]
    on_batch_end = worker._on_batch_end
    run = worker.loop.run
    (trainer,) = worker.loop.trainers
    predict = trainer.engine.predict
    is_spoiled = torch.distributed.get_rank() == rank
    worker.loop.report = InMemoryReport()

    def infinite(batch: Any) -> torch.Tensor:
        return torch.full_like(predict(batch), float("inf"))

    def spoil_batch(
        window_pass: Any,
        progress: Any,
        group: int,
    ) -> None:
        step = (window_pass.window, progress.batches - 1)
        if step == (window, 5) and is_spoiled and what == "loss":
            trainer.losses[-1].fill_(float("nan"))
        on_batch_end(window_pass, progress, group)

    def spoil_window(number: int) -> None:
        if number == window and what == "logits":
            trainer.engine.predict = infinite  # type: ignore[method-assign]
        run(number)
        if number == window and is_spoiled and what in ("weight", "momentum"):
            shard = next(trainer.engine.tables.shards())
            tensor = shard.weight_RW if what == "weight" else shard.momentum_R
            tensor.view(-1)[0] = float("inf")

    worker._on_batch_end = spoil_batch  # type: ignore[method-assign]
    worker.loop.run = spoil_window  # type: ignore[method-assign]
    try:
        worker.run(windows, job.checkpoints.latest())
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("workers", "what", "named"),
    [
        (
            1,
            "loss",
            "window 2, batch 5: the loss of 'fm' is not a number, training stops; "
            "the last good checkpoint is",
        ),
        (
            2,
            "loss",
            "window 2, batch 5: the loss of 'fm' is not a number, training stops; "
            "the last good checkpoint is",
        ),
        (
            1,
            "weight",
            "window 2: 'user@0' of 'fm' is not finite, the model has diverged, "
            "so it is not stored; the last good checkpoint is",
        ),
        (
            2,
            "weight",
            "of 'fm' is not finite, the model has diverged, "
            "so it is not stored; the last good checkpoint is",
        ),
        (
            1,
            "momentum",
            "windows=003: 'lanes/fm/tables/user/momentum@0' is not finite, "
            "the model has diverged, so this checkpoint is not written",
        ),
    ],
    ids=["loss", "loss of two", "weight", "weight of two", "momentum"],
)
def test_nan_stops_and_keeps_the_last_good_state(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
    workers: int,
    what: str,
    named: str,
) -> None:
    """Wrong: training goes on with NaN, the error does not name the first batch, or a state with
    NaN is published or becomes the newest checkpoint."""
    config = with_inputs(base, tmp_path, "run", fm={"workers": workers}, vm={"models": []})
    job = Job("fm", config)
    windows = list(range(WINDOWS))
    for message in groups[workers].run(train_to_nan, job, windows, 2, workers - 1, what):
        assert named in message, message
        assert "windows=002. Lower " in message
        assert message.endswith("learning rates under another --name")
    assert job.checkpoints.latest() == Cursor(2)
    assert SnapshotStore.from_config(config).versions() == (
        [1, 2, 3] if what == "momentum" else [1, 2]
    )


def test_infinite_logits_are_reported(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: a model that predicts infinity ends in a traceback, because its figures are no
    JSON."""
    config = with_inputs(base, tmp_path, "run", vm={"models": []})
    windows = list(range(WINDOWS))
    (message,) = groups[1].run(train_to_nan, Job("fm", config), windows, 1, 0, "logits")
    assert message.startswith("window 1, evaluation of 'fm' on all, ")
    assert "900 of 900 logits are not finite: the model has diverged" in message


def test_nan_does_not_overwrite_an_export(
    groups: dict[int, Workers],
    base: Config,
    tmp_path: Path,
) -> None:
    """Wrong: the export of a followed stream is replaced by one with NaN."""
    vm = {"arms": ["labels"], "models": [base.vm.models[0].model_dump(mode="json")]}
    config = with_inputs(base, tmp_path, "run", vm=vm)
    (job,) = vm_jobs(config)
    groups[1].run(train, job, [0, 1], None)
    before = files(config, "exported")
    (message,) = groups[1].run(train_to_nan, job, [0, 1, 2], 2, 0, "weight")
    assert message.startswith("window 2: 'user@0' of 'feed-labels' is not finite")
    assert "windows=002. Lower vm.optimizer's" in message
    assert files(config, "exported") == before
    _, manifest = load_model(config.folder / "exported" / "feed-labels")
    assert manifest.facts["windows"] == 2
