"""What the students of benchmarks/share.py are given: an FM with its supervision and rows,
histories, and the controls of both.

<folder>/<dataset>/                the stream
<folder>/<dataset>-<seed>/         the FM's snapshots, supervision and rows
<folder>/<dataset>-<seed>-<rows>/  beside it, by `Variant.rows`: rows of a control, or a history
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import load_file, save_file

from benchmarks.share_runs import DRIFTS, JUDGED, MIXED, Rows, trimmed
from benchmarks.study import KUAIRAND, Dataset
from exfm_ray.config.checks import with_settings
from exfm_ray.config.load import load_config
from exfm_ray.config.root import Config
from exfm_ray.das.labeler import Labeler
from exfm_ray.das.student_data import StudentData
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream, StreamWriter, list_values, window_name
from exfm_ray.storage.atomic import atomic_path, read_json, sha256, write_json
from exfm_ray.stores.shared_rows import SharedStore
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.stores.user_history import history_store
from exfm_ray.training.checkpoint import BEGINNING
from exfm_ray.training.job import Job
from exfm_ray.training.local import InMemoryReport, LocalClient, init_single_process
from exfm_ray.training.worker import Worker

ROOT = Path(__file__).parents[1]
WINDOWS = range(JUDGED.stop)


def configured(
    dataset: Dataset,
    folder: Path,
    data: Path,
    seed: int | None,
) -> Config:
    """The data set's config with the students that are judged, and arms that need all that the
    variants read; None: its stream's."""
    overrides = [
        f"run.dir={folder}",
        f"seed={seed or 0}",
        "wandb.mode=disabled",
        *dataset.overrides,
    ]
    overrides += [f"data.root={data.absolute() / 'kuairand_pure'}"] if dataset is KUAIRAND else []
    overrides += ["vm.arms=[labels,kd,labels+share]"]
    config = load_config(
        ROOT / "configs" / f"{dataset.config}.yaml",
        overrides,
        dataset.config + ("" if seed is None else f"-{seed}"),
    )
    chosen = [
        student.model_dump(mode="json")
        for student in config.vm.models
        if student.name in dataset.students or not dataset.students
    ]
    return with_settings(config, {"vm.models": chosen})


def beside(config: Config, rows: str) -> Config:
    """The config of the folder beside the run's that holds a control's rows, or a history."""
    settings: dict[str, object] = {"name": f"{config.name}-{rows}"} if rows else {}
    if rows in (*DRIFTS, MIXED):
        settings |= {
            "distillation.history.embedding_space": DRIFTS[0] if rows == MIXED else rows,
            "vm.arms": [*config.vm.arms, "labels+history"],
        }
    return with_settings(config, settings)


def write_stream(config: Config) -> None:
    """Prepare a data set's stream, whole or not at all."""
    prepare(config)


def teach(config: Config, stream_root: Path) -> list[dict[str, Any]]:
    """The FM with its supervision and rows, and beside them what the variants are given; the FM's
    rows of metrics. Begins anew."""
    torch.set_num_threads(1)
    init_single_process()
    for rows in ("", "shuffled", "permuted", MIXED, *DRIFTS):
        folder = beside(config, rows).folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if rows != "shuffled":
            (folder / "stream").symlink_to(stream_root)
    stream = EventStream.open(stream_root)
    metrics = train_fm(config)
    Labeler(config, stream).label_locally(WINDOWS)
    shuffled = beside(config, "shuffled")
    permute_labels(stream, shuffled.folder / "stream", config.seed)
    train_fm(shuffled)
    publish(shuffled, shuffled, stream)
    permute_rows(config, beside(config, "permuted").folder, stream)
    for rows in (*DRIFTS, MIXED):
        for part in ("supervision", "shared"):
            (beside(config, rows).folder / part).symlink_to(config.folder / part)
    for drift in DRIFTS:
        publish(beside(config, drift), config, stream)
    mix_users(*(beside(config, rows) for rows in (DRIFTS[0], MIXED)))
    return metrics


def train_fm(config: Config) -> list[dict[str, Any]]:
    """Train a run's FM here, over the windows that count; its rows of metrics."""
    job = Job("fm", config)
    report = InMemoryReport()
    worker = Worker(job, None, report, torch.device("cpu"))
    worker.loop.client = LocalClient(worker.loop.reader, job.passes(WINDOWS, BEGINNING))  # type: ignore[assignment]
    worker.run(WINDOWS, BEGINNING)
    return [{"domain": row["domain"], "task": row["task"], **trimmed(row)} for row in report.rows]


def fm_rows(
    metrics: list[dict[str, Any]],
    domain: str,
    task: str,
) -> Rows:
    """Those of a student's examples."""
    return [row for row in metrics if (row["domain"], row["task"]) == (domain, task)]


def publish(
    config: Config,
    teacher: Config,
    stream: EventStream,
) -> None:
    """Publish what a config's arms are given beside predictions, by another run's FM."""
    policy = SnapshotPolicy.from_config(config.das)
    snapshots = SnapshotStore(teacher.folder / "snapshots", teacher.fm.name)
    for window in WINDOWS:
        version = policy.version(window)
        if version is not None:
            StudentData.from_config(config).publish(
                stream, snapshots, stream.window(window), version
            )


def permute_labels(
    stream: EventStream,
    folder: Path,
    seed: int,
) -> None:
    """The stream with the labels of each fragment in another order."""
    shutil.copytree(str(stream.root), folder)
    copy = EventStream.open(folder)
    windows = {number: copy.window(number) for number in stream.windows()}
    for number in windows:
        (
            folder / window_name(number) / "manifest.json"
        ).unlink()  # the writer leaves committed windows as they are
    writer = StreamWriter(folder, stream.schema, read_json(folder / "settings.json"), 2**31)
    rng = np.random.default_rng(seed)
    for number, window in windows.items():
        tables = []
        for fragment in window.fragments:
            table = copy.read(number, fragment)
            labels_NT = rng.permutation(list_values(table["labels"], len(stream.schema.tasks)))
            place = table.column_names.index("labels")
            tables.append(
                table.set_column(
                    place,
                    "labels",
                    pa.FixedSizeListArray.from_arrays(labels_NT.ravel(), labels_NT.shape[1]),
                )
            )
        writer.write_window(number, window.start_ms, window.end_ms, window.duplicates, tables)


def permute_rows(
    config: Config,
    folder: Path,
    stream: EventStream,
) -> None:
    """The run's rows with the ids of every table mixed up, the same way in all windows: each has
    the row of one first seen in the same window."""
    store = SharedStore(folder / "shared", config.fm.name)
    snapshots = SnapshotStore.from_config(config, config.fm.name)
    shutil.copytree(config.folder / "shared", folder / "shared")
    rng = np.random.default_rng(config.seed)
    other = {name: np.full(rows, -1) for name, rows in stream.schema.tables.items()}
    for window in (window for window in WINDOWS if store.has(window)):
        manifest = store.manifest(window)
        tables = snapshots.load(manifest.snapshot, stream.schema.digest)[0].tables.tables()
        paths = {
            domain: Path(str(store.folder(window) / part.file))
            for domain, part in manifest.domains.items()
        }
        given = {domain: load_file(path) for domain, path in paths.items()}
        for name, known in other.items():
            ids = np.unique(
                np.concatenate(
                    [
                        np.empty(0, np.int64),
                        *(t[f"ids/{name}"] for t in given.values() if f"ids/{name}" in t),
                    ]
                )
            )
            new = ids[known[ids] < 0]
            known[new] = rng.permutation(new)
            for tensors in (t for t in given.values() if f"ids/{name}" in t):
                tensors[f"rows/{name}"] = tables[name].numpy()[known[tensors[f"ids/{name}"]]]
        for domain, path in paths.items():
            with atomic_path(path) as temporary:
                save_file(given[domain], temporary)
            manifest.domains[domain] = manifest.domains[domain].model_copy(
                update={"sha256": sha256(path)}
            )
        write_json(store.folder(window) / "manifest.json", manifest.model_dump(mode="json"))


def mix_users(remembered: Config, mixed: Config) -> None:
    """A history with its users mixed up, the same way in all windows: each has another's past, of
    one first seen in the same window.

    So it is told of as many examples' users, and as much, as the history that it stands beside.
    """
    store = history_store(remembered)
    own = history_store(mixed)
    assert store and own
    shutil.copytree(str(store.root), str(own.root))
    rng = np.random.default_rng(remembered.seed)
    keys = np.empty(0, np.int64)
    other = np.empty(0, np.int64)
    for window in (window for window in WINDOWS if own.has(window)):
        path = own.folder(window) / "after.safetensors"
        arrays = load_file(path)
        if not arrays:
            continue
        new = np.setdiff1d(arrays["users"], keys)
        keys = np.concatenate([keys, new])
        other = np.concatenate([other, rng.permutation(new)])
        order = np.argsort(keys)
        renamed = other[order][np.searchsorted(keys[order], arrays["users"])]
        by_user = np.argsort(renamed)
        with atomic_path(path) as temporary:
            save_file(
                {
                    "users": renamed[by_user],
                    **{name: array[by_user] for name, array in arrays.items() if name != "users"},
                },
                temporary,
            )
            hashed = sha256(temporary)
        write_json(
            own.folder(window) / "manifest.json",
            own.manifest(window).model_copy(update={"sha256": hashed}).model_dump(mode="json"),
        )
