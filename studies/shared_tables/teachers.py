"""What the students of the study receive: an FM's supervision, rows and histories, and controls.

<folder>/<dataset>/                the stream
<folder>/<dataset>-<seed>/         the FM's snapshots, supervision and rows
<folder>/<dataset>-<seed>-<rows>/  beside it, by `Variant.rows`: rows of a control, or a history
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import load_file, save_file

from exfm_ray.config.checks import with_settings
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
from studies.common import Dataset, dataset_config
from studies.shared_tables.trainings import HOLDOUT, MIXED, SPACES, Rows, trimmed

WINDOWS = range(HOLDOUT.stop)
SHUFFLED = "shuffled"
PERMUTED = "permuted"


def study_config(
    dataset: Dataset,
    folder: Path,
    data: Path,
    seed: int | None,
) -> Config:
    """Return the config of a data set, with arms that need everything that the variants read.

    Args:
        seed: None for the config of the stream, which all seeds share.
    """
    overrides = [
        f"seed={seed or 0}",
        "wandb.mode=disabled",
        "vm.arms=[labels,kd,labels+share]",
    ]
    name = dataset.config if seed is None else f"{dataset.config}-{seed}"
    return dataset_config(dataset, folder, data, overrides, name)


def beside(config: Config, rows: str) -> Config:
    """Return the config of the folder beside the run's that holds a control's rows or a history.

    Args:
        rows: as in `Variant.rows`; empty for the run's own folder.
    """
    settings: dict[str, object] = {}
    if rows:
        settings["name"] = f"{config.name}-{rows}"
    if rows in (*SPACES, MIXED):
        settings["distillation.history.embedding_space"] = SPACES[0] if rows == MIXED else rows
        settings["vm.arms"] = [*config.vm.arms, "labels+history"]
    return with_settings(config, settings)


def write_stream(config: Config) -> None:
    """Prepare the stream of a data set."""
    prepare(config)


def teach(config: Config, stream_root: Path) -> list[dict[str, Any]]:
    """Train the FM, and publish its supervision and rows and what the variants receive.

    Folders of an earlier attempt are removed.

    Returns:
        The FM's rows of metrics.
    """
    torch.set_num_threads(1)
    init_single_process()
    for rows in ("", SHUFFLED, PERMUTED, MIXED, *SPACES):
        folder = beside(config, rows).folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if rows != SHUFFLED:
            (folder / "stream").symlink_to(stream_root)

    stream = EventStream.open(stream_root)
    metrics = train_fm(config)
    Labeler(config, stream).label_locally(WINDOWS)

    shuffled = beside(config, SHUFFLED)
    permute_labels(stream, shuffled.folder / "stream", config.seed)
    train_fm(shuffled)
    publish(shuffled, shuffled, stream)
    permute_rows(config, beside(config, PERMUTED).folder, stream)

    for rows in (*SPACES, MIXED):
        for part in ("supervision", "shared"):
            (beside(config, rows).folder / part).symlink_to(config.folder / part)
    for space in SPACES:
        publish(beside(config, space), config, stream)
    mix_users(beside(config, SPACES[0]), beside(config, MIXED))
    return metrics


def train_fm(config: Config) -> list[dict[str, Any]]:
    """Train a run's FM in this process and return its rows of metrics."""
    job = Job("fm", config)
    report = InMemoryReport()
    worker = Worker(job, None, report, torch.device("cpu"))
    client: Any = LocalClient(worker.loop.reader, job.passes(WINDOWS, BEGINNING))
    worker.loop.client = client
    worker.run(WINDOWS, BEGINNING)
    return [{"domain": row["domain"], "task": row["task"], **trimmed(row)} for row in report.rows]


def fm_rows(
    metrics: Sequence[dict[str, Any]],
    domain: str,
    task: str,
) -> Rows:
    """Return the FM's rows of metrics on a student's examples."""
    return [row for row in metrics if (row["domain"], row["task"]) == (domain, task)]


def publish(
    config: Config,
    teacher: Config,
    stream: EventStream,
) -> None:
    """Publish what a config's arms receive beside predictions, from the FM of another run."""
    policy = SnapshotPolicy.from_config(config.das)
    snapshots = SnapshotStore(teacher.folder / "snapshots", teacher.fm.name)
    student_data = StudentData.from_config(config)
    for window in WINDOWS:
        version = policy.version(window)
        if version is not None:
            student_data.publish(stream, snapshots, stream.window(window), version)


def permute_labels(
    stream: EventStream,
    folder: Path,
    seed: int,
) -> None:
    """Write the stream to `folder` with the labels of each fragment permuted."""
    shutil.copytree(str(stream.root), folder)
    copy = EventStream.open(folder)
    windows = {number: copy.window(number) for number in stream.windows()}
    for number in windows:  # the writer leaves committed windows unchanged
        (folder / window_name(number) / "manifest.json").unlink()

    settings = read_json(folder / "settings.json")
    writer = StreamWriter(folder, stream.schema, settings, fragment_rows=2**31)
    rng = np.random.default_rng(seed)
    for number, window in windows.items():
        tables = []
        for fragment in window.fragments:
            table = copy.read(number, fragment)
            labels_NT = rng.permutation(list_values(table["labels"], len(stream.schema.tasks)))
            labels = pa.FixedSizeListArray.from_arrays(labels_NT.ravel(), labels_NT.shape[1])
            position = table.column_names.index("labels")
            tables.append(table.set_column(position, "labels", labels))
        writer.write_window(number, window.start_ms, window.end_ms, window.duplicates, tables)


def permute_rows(
    config: Config,
    folder: Path,
    stream: EventStream,
) -> None:
    """Copy the run's shared rows to `folder` with the ids of every table permuted.

    An id receives the row of an id first seen in the same window, the same one in all windows.
    """
    store = SharedStore(folder / "shared", config.fm.name)
    snapshots = SnapshotStore.from_config(config, config.fm.name)
    shutil.copytree(config.folder / "shared", folder / "shared")
    rng = np.random.default_rng(config.seed)
    source_ids = {name: np.full(rows, -1) for name, rows in stream.schema.tables.items()}

    for window in WINDOWS:
        if not store.has(window):
            continue
        manifest = store.manifest(window)
        model, _ = snapshots.load(manifest.snapshot, stream.schema.digest)
        tables = model.tables.tables()
        paths = {
            domain: Path(str(store.folder(window) / file.file))
            for domain, file in manifest.domains.items()
        }
        by_domain = {domain: load_file(path) for domain, path in paths.items()}
        for name, source_of in source_ids.items():
            own = [tensors for tensors in by_domain.values() if f"ids/{name}" in tensors]
            _draw_sources(source_of, [tensors[f"ids/{name}"] for tensors in own], rng)
            for tensors in own:
                sources = source_of[tensors[f"ids/{name}"]]
                tensors[f"rows/{name}"] = tables[name].numpy()[sources]

        for domain, path in paths.items():
            _save(path, by_domain[domain])
            changed = {"sha256": sha256(path)}
            manifest.domains[domain] = manifest.domains[domain].model_copy(update=changed)
        write_json(store.folder(window) / "manifest.json", manifest.model_dump(mode="json"))


def _draw_sources(
    source_of: np.ndarray,
    ids: Sequence[np.ndarray],
    rng: np.random.Generator,
) -> None:
    """Assign to each id without a source (-1) another one of them at random, in place."""
    every_id = np.unique(np.concatenate([np.empty(0, np.int64), *ids]))
    new = every_id[source_of[every_id] < 0]
    source_of[new] = rng.permutation(new)


def mix_users(history: Config, mixed: Config) -> None:
    """Copy a history with its users permuted.

    A user has the past of one first seen in the same window, the same one in all windows. So the
    control knows as many users, and as much of them, as the history.
    """
    original = history_store(history)
    store = history_store(mixed)
    assert original and store
    shutil.copytree(str(original.root), str(store.root))
    rng = np.random.default_rng(history.seed)
    users = np.empty(0, np.int64)
    renamed_users = np.empty(0, np.int64)

    for window in WINDOWS:
        path = Path(str(store.folder(window))) / "after.safetensors"
        arrays = load_file(path) if store.has(window) else {}
        if not arrays:
            continue
        new = np.setdiff1d(arrays["users"], users)
        users = np.concatenate([users, new])
        renamed_users = np.concatenate([renamed_users, rng.permutation(new)])
        by_id = np.argsort(users)
        positions = np.searchsorted(users[by_id], arrays["users"])
        renamed = renamed_users[by_id][positions]

        by_new_id = np.argsort(renamed)
        mixed_arrays = {name: array[by_new_id] for name, array in arrays.items()}
        mixed_arrays["users"] = renamed[by_new_id]
        _save(path, mixed_arrays)
        manifest = store.manifest(window).model_copy(update={"sha256": sha256(path)})
        write_json(store.folder(window) / "manifest.json", manifest.model_dump(mode="json"))


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with atomic_path(path) as temporary:
        save_file(dict(arrays), temporary)
