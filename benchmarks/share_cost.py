"""What shared rows cost in a window that refreshes a million of them: seconds and bytes, beside the
training of the same window.

The window is the dearest one there can be: each of its 125,000 examples brings 8 ids that no other
has.
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
    """Two windows; every id of each feature occurs in one example of each."""
    features = tuple(SparseFeature(name=f"id{i}", rows=examples + 1) for i in range(FEATURES))
    schema = Schema(features=features, tasks=("click",))
    writer = StreamWriter(folder, schema, {}, 50_000)
    rng = np.random.default_rng(0)
    for window in range(2):
        ids = np.stack(
            [1 + rng.permutation(examples) for _ in features] + [np.ones(examples, np.int64)],
            axis=1,
        ).astype(np.int32)
        table = pa.table(
            {
                "example_id": np.arange(examples) + window * examples,
                "event_time": np.arange(examples) + window * examples,
                "domain": np.zeros(examples, np.int32),
                "sparse": pa.FixedSizeListArray.from_arrays(ids.ravel(), FEATURES + 1),
                "labels": pa.FixedSizeListArray.from_arrays(
                    (rng.random(examples) < 0.2).astype(np.float32), 1
                ),
            }
        )
        writer.write_window(window, window, window + 1, 0, [table])
    return EventStream.open(folder)


def cost(quick: bool) -> dict[str, Any]:
    """Seconds of the DAS and of a worker for one window's rows, bytes moved, and the window's
    training in the labels arm."""
    torch.set_num_threads(1)
    examples = 12_500 if quick else 125_000
    with tempfile.TemporaryDirectory() as place:
        config = Config.model_validate({**SETTINGS, "name": "cost", "run": {"dir": place}})
        stream = make_stream(config.folder / "stream", examples)
        snapshots = SnapshotStore(config.folder / "snapshots", "fm")
        write_tables(
            snapshots.folder(1),
            0,
            {
                f"{n}@0": t
                for n, t in LocalTables(stream.schema, config.fm.model, seed=1).tables().items()
            },
        )
        network = build_network(config.fm.model, stream.schema, 1, 1)
        commit_model(
            snapshots.folder(1),
            config.fm.model,
            stream.schema,
            ("click",),
            network.state_dict(),
            {"teacher": "fm", "version": 1},
        )
        started = time.perf_counter()
        StudentData.from_config(config).publish(stream, snapshots, stream.window(1), 1)
        published = time.perf_counter() - started
        store = shared_store(config)
        assert store is not None
        part = store.manifest(1).domains["all"]
        loop, _ = local_loop(Job("vm", config, config.vm.models), [0, 1])
        loop.run(0)
        (group,) = loop.groups
        started = time.perf_counter()
        group.begin_window(1)
        refreshed = time.perf_counter() - started
        group.lanes = [lane for lane in group.lanes if lane.arm == Arm("labels")]
        started = time.perf_counter()
        loop.run(1)
        trained = time.perf_counter() - started
    return {
        "rows": part.rows,
        "examples": examples,
        "bytes_a_window": part.bytes,
        "publish_s": published,
        "refresh_s": refreshed,
        "train_s": trained,
        "refresh_share_of_training": refreshed / trained,
        "publish_and_refresh_share_of_training": (published + refreshed) / trained,
    }
