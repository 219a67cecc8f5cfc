"""Tables sharded over 2 workers against 1: the same model to floating-point accuracy, half the
memory for each.

    python -m benchmarks.embeddings [--quick]

Two tables of equal size, one of them also read by a multi-valued feature, are trained for 50 steps
of 4096 examples by one worker, and by two with table-wise and with row-wise sharding: real
processes, gloo between them, one torch thread each. Afterwards the tables, their Adagrad state and
the logits of fresh examples are compared element by element. Memory of a worker is counted twice:
bytes of its shards and their optimizer state, and resident memory of its process after training
less that before the tables were made: a small engine was made and trained before that, so that
libraries are loaded, and freed memory is given back to the system each time before it is measured.
The largest worker counts.
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

SAYS = "Trains two tables on 1 worker and, table-wise and row-wise, on 2: about a minute (--quick: somewhat less)."
DIM = 32
BATCH_SIZE = 4096
WARMUP = 5
MODEL = {"type": "dcnv2", "dim": DIM, "cross_layers": 1, "mlp": [32]}
DIFFERENCE = 1e-5
MEMORY = 0.55


class Layout(NamedTuple):
    """How many workers, and how they share the tables."""

    workers: int
    sharding: str

    @property
    def name(self) -> str:
        return f"{self.sharding}_{self.workers}"


ALONE = Layout(1, "table_wise")
LAYOUTS = (ALONE, Layout(2, "table_wise"), Layout(2, "row_wise"))


def schema(rows: int) -> Schema:
    """Two tables of `rows` rows; `recent` holds several values of the second."""
    features = [
        SparseFeature(name=name, encoding=Encoding.INDEX, rows=rows) for name in ("user", "ad")
    ]
    recent = SparseFeature(
        name="recent", kind=Kind.MULTI, encoding=Encoding.INDEX, rows=rows, table="ad", max_length=4
    )
    return Schema(features=(*features, recent), tasks=("label",))


def events(of: Schema, seed: int) -> pa.Table:
    """A batch of random ids (log-uniform: few are frequent, most rare) whose labels depend on
    them."""
    draw = np.random.default_rng(seed)
    rows = of.tables["user"]
    ids = ((rows - 1) ** draw.random((BATCH_SIZE, 6))).astype(np.int32)
    labels = (draw.random(BATCH_SIZE) < 0.2 + 0.5 * (ids[:, 0] % 3 == ids[:, 1] % 3)).astype(
        np.float32
    )
    sparse = np.concatenate([ids[:, :2], np.ones((BATCH_SIZE, 1), np.int32)], axis=1)
    recent = pa.FixedSizeListArray.from_arrays(pa.array(ids[:, 2:].reshape(-1)), 4).cast(
        pa.list_(pa.int32())
    )
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
    """Bytes of this process in memory, without what the C library only keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def build(of: Schema, sharding: str) -> BatchGroup:
    """The one group of an FM's job."""
    config = Config.model_validate(
        {"fm": {"model": MODEL, "batch_size": BATCH_SIZE, "sharding": sharding}}
    )
    (group,) = build_groups(Job("fm", config), of, torch.device("cpu"))
    return group


def worker(
    rank: int,
    layout: Layout,
    folder: Path,
    rows: int,
    steps: int,
) -> None:
    """Train, and write what this worker holds and how it went into `folder`."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(layout.workers),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(layout.workers),
    }
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=layout.workers
    )
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
        seconds += time.perf_counter() - started if step >= WARMUP else 0.0
    grown = resident() - before
    result = group.gather([group.evaluate(events(of, steps))])
    if result:
        np.save(folder / "logits.npy", result.logits[group.trainers[0].name])
    own = 0
    for shard in group.trainers[0].engine.tables.shards():
        own += shard.weight_RW.nbytes + shard.momentum_R.nbytes
        np.save(folder / f"weight.{shard.table}.{shard.first_row:08d}.npy", shard.weight_RW.numpy())
        np.save(
            folder / f"momentum.{shard.table}.{shard.first_row:08d}.npy", shard.momentum_R.numpy()
        )
    speed = BATCH_SIZE * (steps - WARMUP) / seconds
    (folder / f"worker{rank}.json").write_text(
        json.dumps({"table_bytes": own, "resident_bytes": grown, "examples_per_s": speed})
    )
    dist.barrier()
    dist.destroy_process_group()


def whole(
    folder: Path,
    kind: str,
    table: str,
) -> np.ndarray[Any, Any]:
    """A table, or its optimizer state, from all workers' shards."""
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"{kind}.{table}.*.npy"))])


def difference(folder: Path, alone: Path) -> dict[str, float]:
    """Largest absolute difference of weights, optimizer state and logits, and the largest of these
    values themselves (`_size`)."""
    found = {}
    for kind in ("weight", "momentum"):
        pairs = [
            (whole(folder, kind, table), whole(alone, kind, table)) for table in schema(2).tables
        ]
        found[kind] = max(float(np.abs(a - b).max()) for a, b in pairs)
        found[f"{kind}_size"] = max(float(np.abs(b).max()) for _, b in pairs)
    logits = [np.load(path / "logits.npy") for path in (folder, alone)]
    return found | {
        "logits": float(np.abs(logits[0] - logits[1]).max()),
        "logits_size": float(np.abs(logits[1]).max()),
    }


def train(
    layout: Layout,
    scratch: Path,
    rows: int,
    steps: int,
) -> dict[str, float]:
    """One layout: memory of its largest worker, and its speed."""
    folder = scratch / layout.name
    folder.mkdir()
    mp.spawn(worker, (layout, folder, rows, steps), nprocs=layout.workers)  # type: ignore[no-untyped-call,attr-defined]
    told = [json.loads(path.read_text()) for path in folder.glob("worker*.json")]
    figures = {
        key: max(worker[key] for worker in told) for key in ("table_bytes", "resident_bytes")
    }
    figures["examples_per_s"] = min(worker["examples_per_s"] for worker in told)
    print(
        f"{layout.name}: " + ", ".join(f"{key} {value:,.0f}" for key, value in figures.items()),
        flush=True,
    )
    return figures


def main() -> None:
    options = arguments("benchmarks.embeddings", SAYS)
    rows = 1_000_000
    steps = 15 if options.quick else 50
    bars = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        figures: dict[str, Any] = {
            layout.name: train(layout, scratch, rows, steps) for layout in LAYOUTS
        }
        for layout in LAYOUTS[1:]:
            own = figures[layout.name]
            alone = figures[ALONE.name]
            name = layout.sharding
            own["difference"] = difference(scratch / layout.name, scratch / ALONE.name)
            for kind in ("weight", "momentum", "logits"):
                # Relative to the largest value: an error of float32 grows with what it is an error
                # of.
                relative = own["difference"][kind] / own["difference"][f"{kind}_size"]
                bars[f"{name}_{kind}_difference"] = bar(relative, DIFFERENCE, at_least=False)
            for key in ("table_bytes", "resident_bytes"):
                bars[f"{name}_{key}"] = bar(own[key] / alone[key], MEMORY, at_least=False)
    report("embeddings", {"rows": rows, "dim": DIM, "steps": steps, **figures}, bars)


if __name__ == "__main__":
    main()
