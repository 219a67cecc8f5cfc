"""What shared rows cost in a window that refreshes a million of them.

Seconds and bytes, beside the training of the same window. No window could be more expensive: each
of its 125,000 examples has 8 ids that no other example has.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from exfm_ray.config.arms import Arm
from exfm_ray.config.root import Config
from exfm_ray.das.student_data import StudentData
from exfm_ray.data.stream import EventStream, StreamWriter
from exfm_ray.models.embeddings import LocalTables
from exfm_ray.models.network import build_network
from exfm_ray.models.serialization import commit_model, write_tables
from exfm_ray.schema import Schema, SparseFeature
from exfm_ray.stores.shared_rows import shared_store
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.training.job import Job
from exfm_ray.training.local import local_loop

FEATURES = 8
DIM = 16
SETTINGS: dict[str, Any] = {
    "fm": {"model": {"type": "mlp", "dim": DIM, "mlp": [64, 32]}},
    "vm": {
        "model": {"type": "mlp", "dim": DIM, "mlp": [64, 32]},
        "batch_size": 256,
        "arms": ["labels", "labels+share"],
        "threads": 1,
        "models": [{"name": "vm", "domain": "all", "task": "click"}],
    },
    "wandb": {"mode": "disabled"},
}


def make_stream(folder: Path, examples: int) -> EventStream:
    """Write two windows in which every id of each feature occurs in one example."""
    features = tuple(SparseFeature(name=f"id{i}", rows=examples + 1) for i in range(FEATURES))
    schema = Schema(features=features, tasks=("click",))
    writer = StreamWriter(folder, schema, {}, 50_000)
    rng = np.random.default_rng(0)
    for window in range(2):
        table = random_examples(examples, examples * window, rng)
        writer.write_window(window, window, window + 1, 0, [table])
    return EventStream.open(folder)


def random_examples(
    count: int,
    first_id: int,
    rng: np.random.Generator,
) -> pa.Table:
    """Return examples with each id of each feature once, in random order."""
    ids = [1 + rng.permutation(count) for _ in range(FEATURES)]
    domain_feature = np.ones(count, np.int64)
    sparse = np.stack([*ids, domain_feature], axis=1).astype(np.int32)
    labels = (rng.random(count) < 0.2).astype(np.float32)
    number = np.arange(count) + first_id
    columns = {
        "example_id": number,
        "event_time": number,
        "domain": np.zeros(count, np.int32),
        "sparse": pa.FixedSizeListArray.from_arrays(sparse.ravel(), FEATURES + 1),
        "labels": pa.FixedSizeListArray.from_arrays(labels, 1),
    }
    return pa.table(columns)


def write_snapshot(config: Config, schema: Schema) -> SnapshotStore:
    """Write version 1 of an untrained FM."""
    model = config.fm.model
    snapshots = SnapshotStore(config.folder / "snapshots", "fm")
    folder = snapshots.folder(1)
    tables = LocalTables(schema, model, seed=1).tables()
    write_tables(folder, 0, {f"{name}@0": table for name, table in tables.items()})
    network = build_network(model, schema, 1, 1)
    facts = {"teacher": "fm", "version": 1}
    commit_model(folder, model, schema, ("click",), network.state_dict(), facts)
    return snapshots


def cost(quick: bool) -> dict[str, Any]:
    """Measure one window: the DAS and a worker with its rows, and training in the labels arm."""
    torch.set_num_threads(1)
    examples = 12_500 if quick else 125_000
    with tempfile.TemporaryDirectory() as folder:
        config = Config.model_validate({**SETTINGS, "name": "cost", "run": {"dir": folder}})
        stream = make_stream(config.folder / "stream", examples)
        snapshots = write_snapshot(config, stream.schema)

        started = time.perf_counter()
        StudentData.from_config(config).publish(stream, snapshots, stream.window(1), 1)
        publish_s = time.perf_counter() - started
        store = shared_store(config)
        assert store is not None
        shared_file = store.manifest(1).domains["all"]

        loop, _ = local_loop(Job("vm", config, config.vm.models), [0, 1])
        loop.run(0)
        (group,) = loop.groups
        started = time.perf_counter()
        group.begin_window(1)
        refresh_s = time.perf_counter() - started

        group.trainers = [trainer for trainer in group.trainers if trainer.arm == Arm("labels")]
        started = time.perf_counter()
        loop.run(1)
        train_s = time.perf_counter() - started
    return {
        "rows": shared_file.rows,
        "examples": examples,
        "bytes_a_window": shared_file.bytes,
        "publish_s": publish_s,
        "refresh_s": refresh_s,
        "train_s": train_s,
        "refresh_share_of_training": refresh_s / train_s,
        "publish_and_refresh_share_of_training": (publish_s + refresh_s) / train_s,
    }
