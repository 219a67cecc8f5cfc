"""What training the foundation model needs of each worker, on paper: nothing is allocated and no
data are read.

Exact are the bytes that a worker keeps: tables, row-wise Adagrad, dense weights, their float32
masters, Adam, moving average. What a step takes beside them is an estimate: see `gradient_bytes`,
`activation_bytes` and `lookup_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exfm_ray.config.root import Config
from exfm_ray.config.trainer import FMConfig
from exfm_ray.models.flops import training_flops
from exfm_ray.models.layout import Layout
from exfm_ray.models.network import Network
from exfm_ray.planner.table_placement import place_tables
from exfm_ray.schema import Schema

FLOAT_BYTES = 4
REDUCE_BUCKET = 500_000_000
"""Numbers in DeepSpeed's reduce bucket by default. On a GPU it is allocated whole, of a CPU's
memory only what is written to."""
MAX_LIVE_PARAMETERS = 1_000_000_000
"""Most gathered weights that ZeRO stage 3 keeps by default (stage3_max_live_parameters)."""
UTILIZATION = 0.3
"""Share of a worker's peak that its matrix products are assumed to reach. An assumption: nothing
here measures it."""

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class TableShards:
    """One table over the workers: `rows_W` on each of them, every row `width` float32 numbers and
    one of row-wise Adagrad."""

    name: str
    rows: int
    width: int
    sharding: str
    rows_W: Ints

    @property
    def row_bytes(self) -> int:
        """Of one row, with its Adagrad state."""
        return FLOAT_BYTES * (self.width + 1)

    @property
    def largest_bytes(self) -> int:
        """Of the worker that holds most of the table, with the Adagrad state."""
        return int(self.rows_W.max()) * self.row_bytes


@dataclass(frozen=True)
class DenseState:
    """Bytes of the dense part on each worker.

    Attributes:
        parameters: of the whole network.
        weights, masters, adam: kept; `masters` are float32 copies that DeepSpeed steps on (none in
            stage 0 with fp32).
        gradients: most at once in a step: gradients and the buffers that they are reduced in.
        gathered: ZeRO stage 3's whole weights in a step.
    """

    parameters: int
    weights: int
    masters: int
    adam: int
    gradients: int
    gathered: int


@dataclass(frozen=True)
class MemoryPlan:
    """A training on paper. Suffix W: one number for each worker; all sizes in bytes."""

    fm: FMConfig
    shards: tuple[TableShards, ...]
    dense: DenseState
    share_examples: int
    activation_bytes: int
    lookup_bytes_W: Ints
    training_flops: int
    last_use_bytes: int

    @property
    def table_parameters(self) -> int:
        """Numbers in all tables."""
        return sum(shard.rows * shard.width for shard in self.shards)

    @property
    def parameters(self) -> int:
        """Tables and dense part."""
        return self.table_parameters + self.dense.parameters

    @property
    def replica_bytes(self) -> int:
        """What one DAS actor holds: all tables and the whole network, float32."""
        return FLOAT_BYTES * self.parameters

    @cached_property
    def table_bytes_W(self) -> Ints:
        """Weights of the tables."""
        return self._over_workers({shard.name: FLOAT_BYTES * shard.width for shard in self.shards})

    @cached_property
    def adagrad_bytes_W(self) -> Ints:
        """Row-wise Adagrad: one number a row."""
        return self._over_workers({shard.name: FLOAT_BYTES for shard in self.shards})

    @cached_property
    def average_bytes_W(self) -> Ints:
        """The moving average: a float32 copy of tables and dense weights, where it is set."""
        used = self.fm.optimizer.ema > 0
        return (self.table_bytes_W + FLOAT_BYTES * self.dense.parameters) * used

    @cached_property
    def resident_bytes_W(self) -> Ints:
        """From one step to the next."""
        dense = self.dense.weights + self.dense.masters + self.dense.adam
        return (
            self.table_bytes_W
            + self.adagrad_bytes_W
            + self.average_bytes_W
            + dense
            + self.last_use_bytes
        )

    @cached_property
    def transient_bytes_W(self) -> Ints:
        """Most at once beside what is kept: in a step, or in an evaluation, where the moving
        average takes the weights' place and these are set aside."""
        step_W = (
            self.dense.gradients + self.dense.gathered + self.activation_bytes + self.lookup_bytes_W
        )
        aside_W = (self.table_bytes_W + self.dense.weights) * (self.fm.optimizer.ema > 0)
        return np.maximum(step_W, aside_W)

    @cached_property
    def bytes_W(self) -> Ints:
        """All of it."""
        return self.resident_bytes_W + self.transient_bytes_W

    @property
    def peak_worker(self) -> int:
        """The worker that needs most; the first of several."""
        return int(self.bytes_W.argmax())

    def examples_per_s(self, peak_tflops: float) -> float:
        """Of all workers, at `peak_tflops` each and `UTILIZATION` of it, with nothing else to wait
        for: not for look-ups, network or data."""
        return self.fm.workers * peak_tflops * 1e12 * UTILIZATION / self.training_flops

    def violations(self, limit_bytes: int) -> list[str]:
        """What does not fit, in words. `limit_bytes`: of each worker's GPU; with device cpu, of the
        machine that all workers share."""
        most = int(self.bytes_W[self.peak_worker])
        if self.fm.device == "cpu":
            total = int(self.bytes_W.sum())
            what = f"all {self.fm.workers} worker(s) together need"
            return (
                [
                    f"{what} {format_bytes(total)} of the machine's {format_bytes(limit_bytes)}; most of it: {self._greatest()}"
                ]
                if total > limit_bytes
                else []
            )
        over = int((self.bytes_W > limit_bytes).sum())
        if not over:
            return []
        found = [
            f"{over} of {self.fm.workers} worker(s) need more than {format_bytes(limit_bytes)}, worker {self.peak_worker} most: {format_bytes(most)}"
        ]
        found += [
            f"table '{s.name}' ({s.sharding}) alone takes {format_bytes(s.largest_bytes)} of a worker, its Adagrad state included"
            for s in self.shards
            if s.largest_bytes > limit_bytes
        ]
        return [*found, f"most of worker {self.peak_worker}: {self._greatest()}"]

    def parts(self, worker: int) -> dict[str, int]:
        """What a worker's bytes are for."""
        return {
            "tables": int(self.table_bytes_W[worker]),
            "row-wise Adagrad": int(self.adagrad_bytes_W[worker]),
            "dense weights": self.dense.weights,
            "float32 masters": self.dense.masters,
            "Adam": self.dense.adam,
            "moving average": int(self.average_bytes_W[worker]),
            "last use of rows": self.last_use_bytes,
            "gradients and reduce buffers": self.dense.gradients,
            "gathered weights": self.dense.gathered,
            "activations": self.activation_bytes,
            "looked-up rows": int(self.lookup_bytes_W[worker]),
        }

    def _greatest(self) -> str:
        parts = self.parts(self.peak_worker)
        part = max(parts, key=lambda name: parts[name])
        return f"{part}, {format_bytes(parts[part])}"

    def _over_workers(self, row_bytes: Mapping[str, int]) -> Ints:
        none_W = np.zeros(self.fm.workers, np.int64)
        return sum((shard.rows_W * row_bytes[shard.name] for shard in self.shards), start=none_W)


def format_bytes(size_bytes: int) -> str:
    """Bytes as GiB; MiB where they are few."""
    return (
        f"{size_bytes / 2**30:,.1f} GiB"
        if size_bytes >= 2**30
        else f"{size_bytes / 2**20:,.1f} MiB"
    )


def plan_fm(config: Config, schema: Schema) -> MemoryPlan:
    """The plan of `config.fm` over a schema that its tasks and sizes fit
    (`pipeline.check_models`)."""
    fm = config.fm
    layout = Layout.from_config(fm.model, schema)
    with torch.device("meta"):
        network = Network(fm.model, schema, len(fm.tasks or schema.tasks))
    share = -(-fm.batch_size // fm.workers)
    shards = table_shards(schema, layout, fm)
    return MemoryPlan(
        fm=fm,
        shards=shards,
        dense=dense_state(network, fm),
        share_examples=share,
        activation_bytes=activation_bytes(network, layout, fm, len(schema.dense), share),
        lookup_bytes_W=lookup_bytes(shards, layout, fm, share),
        training_flops=training_flops(fm.model, layout.inputs(len(schema.dense))),
        last_use_bytes=FLOAT_BYTES * sum(schema.tables.values())
        if fm.evict_after_windows and fm.device == "cpu"
        else 0,
    )


def table_shards(
    schema: Schema,
    layout: Layout,
    fm: FMConfig,
) -> tuple[TableShards, ...]:
    """How the tables are cut, the largest first.

    Row-wise, TorchRec gives every worker ceil(rows / workers) rows, as long as there are any.
    """
    found = []
    worker_W = np.arange(fm.workers, dtype=np.int64)
    for name, worker in place_tables(schema.tables, fm.sharding, fm.workers).items():
        rows = schema.tables[name]
        block = -(-rows // fm.workers)
        rows_W = (
            np.clip(rows - block * worker_W, 0, block)
            if worker is None
            else rows * (worker_W == worker)
        )
        found.append(
            TableShards(
                name,
                rows,
                layout.embeddings[name] * fm.model.dim,
                "row_wise" if worker is None else "table_wise",
                rows_W,
            )
        )
    return tuple(found)


def dense_state(network: nn.Module, fm: FMConfig) -> DenseState:
    """The dense part in DeepSpeed 0.19 with torch's AdamW; the flat buffers of stages 1 and 2 are
    padded to two numbers a worker."""
    sizes = [parameter.numel() for parameter in network.parameters()]
    workers = fm.workers
    total = sum(sizes)
    low = 2 if fm.precision == "bf16" else FLOAT_BYTES
    bucket = low * (REDUCE_BUCKET if fm.device == "cuda" else min(total, REDUCE_BUCKET))
    if fm.zero_stage == 0:
        masters = FLOAT_BYTES * total if fm.precision == "bf16" else 0
        beside = (
            FLOAT_BYTES * total
            if fm.precision == "bf16"
            else FLOAT_BYTES * min(total, REDUCE_BUCKET) * (workers > 1)
        )
        return DenseState(
            total, low * total, masters, 2 * FLOAT_BYTES * total, low * total + beside, 0
        )
    if fm.zero_stage < 3:
        part = 2 * -(-total // (2 * workers))
        gradients = low * part + max(bucket, FLOAT_BYTES * part)
        return DenseState(
            total, low * part * workers, FLOAT_BYTES * part, 2 * FLOAT_BYTES * part, gradients, 0
        )
    part = sum(-(-size // workers) for size in sizes)
    gradients = low * part + bucket + FLOAT_BYTES * part
    return DenseState(
        total,
        low * part,
        FLOAT_BYTES * part,
        2 * FLOAT_BYTES * part,
        gradients,
        low * min(total, MAX_LIVE_PARAMETERS) * (workers > 1),
    )


def activation_bytes(
    network: nn.Module,
    layout: Layout,
    fm: FMConfig,
    dense_features: int,
    examples: int,
) -> int:
    """What the interaction model saves for the backward pass of so many examples: counted over the
    model itself, on torch's meta device.

    Args:
        network: on the meta device; it is converted to the dtype of `fm.precision`.
    """
    dtype = torch.bfloat16 if fm.precision == "bf16" else torch.float32
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # held, or its address may become another's
        saved[storage._cdata] = storage
        return tensor

    with (
        torch.device("meta"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        embedded_BRE = torch.empty(
            examples, layout.rows, fm.model.dim, dtype=dtype, requires_grad=True
        )
        network.to(dtype)(embedded_BRE, torch.empty(examples, dense_features, dtype=dtype))
    weights = {
        tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())
    }
    return sum(storage.nbytes() for address, storage in saved.items() if address not in weights)


def lookup_bytes(
    shards: tuple[TableShards, ...],
    layout: Layout,
    fm: FMConfig,
    examples: int,
) -> Ints:
    """float32 rows of a step on each worker: its examples' and their gradient; with several
    workers, too, what it looks up in its shards for the examples of all of them."""
    own_W = np.full(fm.workers, 2 * layout.rows * examples, np.int64)
    if fm.workers > 1:
        read = dict.fromkeys(layout.embeddings, 0)
        for slot in (*layout.single, *layout.bags):
            read[slot.table] += slot.width
        own_W += sum(
            ((shard.rows_W > 0) * (read[shard.name] * examples * fm.workers) for shard in shards),
            start=np.zeros(fm.workers, np.int64),
        )
    return own_W * (FLOAT_BYTES * fm.model.dim)
