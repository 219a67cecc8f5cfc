"""Tables sharded over 2 workers against 1: the same model, half the memory for each worker.

    python -m benchmarks.embeddings [--quick]

Two tables of equal size, one of them also read by a multi-valued feature, are trained for 50 steps
of 4096 examples by one worker, and by two with table-wise and with row-wise sharding: real
processes, gloo between them, one torch thread each. Afterwards the tables, their Adagrad state and
the logits of new examples are compared element by element; they must be equal to floating-point
accuracy.

Memory of a worker is counted twice: bytes of its shards and their optimizer state, and resident
memory of its process after training less that before the tables were made. Before that, a small
engine is made and trained so that libraries are loaded, and freed memory is returned to the system
each time before it is measured. The largest worker counts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import psutil
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.common import arguments, bar, report
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.packer import packed
from exfm_ray.schema import Encoding, Kind, Schema, SparseFeature
from exfm_ray.training.group import BatchGroup
from exfm_ray.training.job import Job
from exfm_ray.training.worker import build_groups

DESCRIPTION = (
    "Trains two tables on 1 worker and, table-wise and row-wise, on 2: "
    "about a minute (--quick: less)."
)
DIM = 32
BATCH_SIZE = 4096
ROWS = 1_000_000
WARMUP = 5
MODEL = {"type": "dcnv2", "dim": DIM, "cross_layers": 1, "mlp": [32]}
DIFFERENCE = 1e-5
MEMORY = 0.55


class Layout(NamedTuple):
    """How many workers there are, and how the tables are divided between them."""

    workers: int
    sharding: str

    @property
    def name(self) -> str:
        return f"{self.sharding}_{self.workers}"


ALONE = Layout(1, "table_wise")
SHARDED = (Layout(2, "table_wise"), Layout(2, "row_wise"))


def schema(rows: int) -> Schema:
    """Return two tables of `rows` rows; `recent` holds several values of the second."""
    user = SparseFeature(name="user", encoding=Encoding.INDEX, rows=rows)
    ad = SparseFeature(name="ad", encoding=Encoding.INDEX, rows=rows)
    recent = SparseFeature(
        name="recent",
        kind=Kind.MULTI,
        encoding=Encoding.INDEX,
        rows=rows,
        table="ad",
        max_length=4,
    )
    return Schema(features=(user, ad, recent), tasks=("label",))


def events(of: Schema, seed: int) -> pa.Table:
    """Return a batch of random ids, whose labels depend on them.

    The ids are log-uniform: few are frequent, most are rare.
    """
    rng = np.random.default_rng(seed)
    rows = of.tables["user"]
    ids = ((rows - 1) ** rng.random((BATCH_SIZE, 6))).astype(np.int32)
    users = ids[:, 0]
    ads = ids[:, 1]
    label_rate = 0.2 + 0.5 * (users % 3 == ads % 3)
    labels = (rng.random(BATCH_SIZE) < label_rate).astype(np.float32)
    domain = np.ones((BATCH_SIZE, 1), np.int32)
    sparse = np.concatenate([ids[:, :2], domain], axis=1)
    recent_ids = pa.array(ids[:, 2:].reshape(-1))
    recent = pa.FixedSizeListArray.from_arrays(recent_ids, 4).cast(pa.list_(pa.int32()))
    number = np.arange(BATCH_SIZE)
    return packed(
        of,
        number,
        number,
        np.zeros(BATCH_SIZE),
        labels[:, None],
        sparse,
        np.zeros((BATCH_SIZE, 0)),
        {"recent": recent},
    )


def resident() -> int:
    """Return this process's resident bytes, after the C library has returned freed memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def build(of: Schema, sharding: str) -> BatchGroup:
    """Build the one group of an FM's job."""
    fm = {"model": MODEL, "batch_size": BATCH_SIZE, "sharding": sharding}
    config = Config.model_validate({"fm": fm})
    (group,) = build_groups(Job("fm", config), of, torch.device("cpu"))
    return group


def worker(
    rank: int,
    layout: Layout,
    folder: Path,
    rows: int,
    steps: int,
) -> None:
    """Train, and write this worker's shards and figures into `folder`."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(layout.workers),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(layout.workers),
    }
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=layout.workers)
    small = schema(1000)
    build(small, layout.sharding).learn(events(small, 0))
    before = resident()

    of = schema(rows)
    group = build(of, layout.sharding)
    seconds = 0.0
    for step in range(steps):
        batch = events(of, step)
        dist.barrier()
        started = time.perf_counter()
        group.learn(batch)
        if step >= WARMUP:
            seconds += time.perf_counter() - started
    resident_bytes = resident() - before

    predictions = group.gather([group.evaluate(events(of, steps))])
    if predictions:
        np.save(folder / "logits.npy", predictions.logits[group.trainers[0].name])
    figures = {
        "table_bytes": write_shards(group, folder),
        "resident_bytes": resident_bytes,
        "examples_per_s": BATCH_SIZE * (steps - WARMUP) / seconds,
    }
    (folder / f"worker{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def write_shards(group: BatchGroup, folder: Path) -> int:
    """Write this worker's shards of tables and optimizer state; their bytes."""
    table_bytes = 0
    for shard in group.trainers[0].engine.tables.shards():
        table_bytes += shard.weight_RW.nbytes + shard.momentum_R.nbytes
        name = f"{shard.table}.{shard.first_row:08d}.npy"
        np.save(folder / f"weight.{name}", shard.weight_RW.numpy())
        np.save(folder / f"momentum.{name}", shard.momentum_R.numpy())
    return table_bytes


def whole(
    folder: Path,
    kind: str,
    table: str,
) -> np.ndarray[Any, Any]:
    """Return a table, or its optimizer state, from all workers' shards."""
    shards = sorted(folder.glob(f"{kind}.{table}.*.npy"))
    return np.concatenate([np.load(path) for path in shards])


def difference(folder: Path, alone: Path) -> dict[str, float]:
    """Return the largest absolute difference of weights, optimizer state and logits.

    `<kind>_size` is the largest of these values themselves.
    """
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for kind in ("weight", "momentum"):
        pairs[kind] = [
            (whole(folder, kind, table), whole(alone, kind, table)) for table in schema(2).tables
        ]
    pairs["logits"] = [(np.load(folder / "logits.npy"), np.load(alone / "logits.npy"))]

    differences = {}
    for kind, of_kind in pairs.items():
        differences[kind] = max(float(np.abs(sharded - one).max()) for sharded, one in of_kind)
        differences[f"{kind}_size"] = max(float(np.abs(one).max()) for _, one in of_kind)
    return differences


def train(
    layout: Layout,
    scratch: Path,
    steps: int,
) -> dict[str, float]:
    """Train with one layout; memory of its largest worker, and its speed."""
    folder = scratch / layout.name
    folder.mkdir()
    mp.spawn(worker, (layout, folder, ROWS, steps), nprocs=layout.workers)  # type: ignore[no-untyped-call,attr-defined]
    workers = [json.loads(path.read_text()) for path in folder.glob("worker*.json")]
    figures = {
        "table_bytes": max(of_worker["table_bytes"] for of_worker in workers),
        "resident_bytes": max(of_worker["resident_bytes"] for of_worker in workers),
        "examples_per_s": min(of_worker["examples_per_s"] for of_worker in workers),
    }
    parts = [f"{key} {value:,.0f}" for key, value in figures.items()]
    print(f"{layout.name}: {', '.join(parts)}", flush=True)
    return figures


def main() -> None:
    options = arguments("benchmarks.embeddings", DESCRIPTION)
    steps = 15 if options.quick else 50
    bars = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        figures: dict[str, Any] = {}
        for layout in (ALONE, *SHARDED):
            figures[layout.name] = train(layout, scratch, steps)
        alone = figures[ALONE.name]
        for layout in SHARDED:
            sharded = figures[layout.name]
            differences = difference(scratch / layout.name, scratch / ALONE.name)
            sharded["difference"] = differences
            for kind in ("weight", "momentum", "logits"):
                # Relative to the largest value: an error of float32 grows with the value.
                relative = differences[kind] / differences[f"{kind}_size"]
                name = f"{layout.sharding}_{kind}_difference"
                bars[name] = bar(relative, DIFFERENCE, at_least=False)
            for key in ("table_bytes", "resident_bytes"):
                fraction = sharded[key] / alone[key]
                bars[f"{layout.sharding}_{key}"] = bar(fraction, MEMORY, at_least=False)
    report("embeddings", {"rows": ROWS, "dim": DIM, "steps": steps, **figures}, bars)


if __name__ == "__main__":
    main()
