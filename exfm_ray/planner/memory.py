"""The memory that training the foundation model needs on each worker, calculated from the settings.

Nothing is allocated and no data are read. The resident bytes are exact: tables, row-wise Adagrad,
dense weights, their float32 masters, Adam, moving average. The transient bytes of a step are an
estimate: see `dense_state`, `activation_bytes` and `lookup_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from exfm_ray.config.root import Config
from exfm_ray.config.trainer import FMConfig
from exfm_ray.models.flops import training_flops
from exfm_ray.models.layout import Layout
from exfm_ray.models.network import Network
from exfm_ray.planner.dense_state import DenseState, dense_state
from exfm_ray.planner.table_placement import FLOAT_BYTES, Ints, TableShards, table_shards
from exfm_ray.schema import Schema

UTILIZATION = 0.3
"""Fraction of a worker's peak that its matrix products reach. An assumption, not a measurement."""


@dataclass(frozen=True)
class MemoryPlan:
    """The calculated needs of a training. Suffix W: one number per worker; sizes are in bytes.

    Attributes:
        fm: the trainer's settings.
        shards: the tables over the workers.
        dense: the dense part.
        worker_examples: examples of a batch on each worker.
        activation_bytes: activations that a worker saves for the backward pass.
        lookup_bytes_W: embedding rows of a step.
        training_flops: floating-point operations per example, forward and backward.
        last_use_bytes: the last use of every row, if unused rows are evicted on the CPU.
    """

    fm: FMConfig
    shards: tuple[TableShards, ...]
    dense: DenseState
    worker_examples: int
    activation_bytes: int
    lookup_bytes_W: Ints
    training_flops: int
    last_use_bytes: int

    @property
    def table_parameters(self) -> int:
        """Number of parameters in all tables."""
        total = 0
        for shard in self.shards:
            total += shard.rows * shard.width
        return total

    @property
    def parameters(self) -> int:
        """Number of parameters of tables and dense part."""
        return self.table_parameters + self.dense.parameters

    @property
    def replica_bytes(self) -> int:
        """Bytes of one DAS actor: all tables and the whole network in float32."""
        return FLOAT_BYTES * self.parameters

    @cached_property
    def table_bytes_W(self) -> Ints:
        """Bytes of the tables' weights."""
        row_bytes = {shard.name: FLOAT_BYTES * shard.width for shard in self.shards}
        return self._over_workers(row_bytes)

    @cached_property
    def adagrad_bytes_W(self) -> Ints:
        """Bytes of row-wise Adagrad, one number per row."""
        row_bytes = {shard.name: FLOAT_BYTES for shard in self.shards}
        return self._over_workers(row_bytes)

    @cached_property
    def average_bytes_W(self) -> Ints:
        """Bytes of the moving average, a float32 copy of tables and dense weights; 0 if unused."""
        if not self._uses_ema:
            return np.zeros(self.fm.workers, np.int64)
        return self.table_bytes_W + FLOAT_BYTES * self.dense.parameters

    @cached_property
    def resident_bytes_W(self) -> Ints:
        """Bytes that are allocated from one step to the next."""
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
        """Most bytes beside the resident ones, in a step or in an evaluation.

        In an evaluation the moving average replaces the weights, and these are copied aside.
        """
        dense_bytes = self.dense.gradients + self.dense.gathered
        step_W = dense_bytes + self.activation_bytes + self.lookup_bytes_W
        if not self._uses_ema:
            return step_W
        weights_W = self.table_bytes_W + self.dense.weights
        return np.maximum(step_W, weights_W)

    @cached_property
    def bytes_W(self) -> Ints:
        """Resident and transient bytes together."""
        return self.resident_bytes_W + self.transient_bytes_W

    @property
    def peak_worker(self) -> int:
        """The worker that needs most; the first of several."""
        return int(self.bytes_W.argmax())

    @property
    def _uses_ema(self) -> bool:
        return self.fm.optimizer.ema > 0

    def examples_per_s(self, peak_tflops: float) -> float:
        """Return the examples per second of all workers if only matrix products took time.

        Args:
            peak_tflops: peak of each worker; `UTILIZATION` of it is assumed to be reached. Waits
                for look-ups, network and data are not included.
        """
        peak_flops = self.fm.workers * peak_tflops * 1e12
        used_flops = peak_flops * UTILIZATION
        return used_flops / self.training_flops

    def violations(self, limit_bytes: int) -> list[str]:
        """Return messages about what does not fit, none if everything does.

        Args:
            limit_bytes: memory of each worker's GPU; with device cpu, of the machine that all
                workers share.
        """
        if self.fm.device == "cpu":
            return self._machine_violations(limit_bytes)
        return self._gpu_violations(limit_bytes)

    def _machine_violations(self, limit_bytes: int) -> list[str]:
        total = int(self.bytes_W.sum())
        if total <= limit_bytes:
            return []
        return [
            f"all {self.fm.workers} worker(s) together need {format_bytes(total)} "
            f"of the machine's {format_bytes(limit_bytes)}; "
            f"most of it: {self._largest_part()}"
        ]

    def _gpu_violations(self, limit_bytes: int) -> list[str]:
        too_large = int((self.bytes_W > limit_bytes).sum())
        if not too_large:
            return []
        worker = self.peak_worker
        peak = int(self.bytes_W[worker])
        messages = [
            f"{too_large} of {self.fm.workers} worker(s) "
            f"need more than {format_bytes(limit_bytes)}, "
            f"worker {worker} most: {format_bytes(peak)}"
        ]
        for shard in self.shards:
            if shard.largest_bytes > limit_bytes:
                messages.append(
                    f"table '{shard.name}' ({shard.sharding}) alone takes "
                    f"{format_bytes(shard.largest_bytes)} of a worker, "
                    "its Adagrad state included"
                )
        messages.append(
            f"most of worker {worker}: {self._largest_part()}",
        )
        return messages

    def parts(self, worker: int) -> dict[str, int]:
        """Return the bytes of one worker by purpose."""
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

    def _largest_part(self) -> str:
        parts = self.parts(self.peak_worker)
        name = max(parts, key=lambda part: parts[part])
        return f"{name}, {format_bytes(parts[name])}"

    def _over_workers(self, row_bytes: Mapping[str, int]) -> Ints:
        total_W = np.zeros(self.fm.workers, np.int64)
        for shard in self.shards:
            total_W = total_W + shard.rows_W * row_bytes[shard.name]
        return total_W


def format_bytes(size_bytes: int) -> str:
    """Return a size in GiB, or in MiB if it is below 1 GiB."""
    mebibytes = size_bytes / 2**20
    if mebibytes < 1024:
        return f"{mebibytes:,.1f} MiB"
    gibibytes = mebibytes / 1024
    return f"{gibibytes:,.1f} GiB"


def plan_fm(config: Config, schema: Schema) -> MemoryPlan:
    """Plan the training of `config.fm`.

    Args:
        config: settings that `pipeline.check_models` has accepted for this schema.
        schema: of the stream.
    """
    fm = config.fm
    layout = Layout.from_config(fm.model, schema)
    with torch.device("meta"):
        network = Network(fm.model, schema, len(fm.tasks or schema.tasks))

    dense_features = len(schema.dense)
    worker_examples = -(-fm.batch_size // fm.workers)
    shards = table_shards(schema, layout, fm)
    last_use_bytes = 0
    if fm.evict_after_windows and fm.device == "cpu":
        last_use_bytes = FLOAT_BYTES * sum(schema.tables.values())
    return MemoryPlan(
        fm=fm,
        shards=shards,
        dense=dense_state(network, fm),
        worker_examples=worker_examples,
        activation_bytes=activation_bytes(network, layout, fm, dense_features, worker_examples),
        lookup_bytes_W=lookup_bytes(shards, layout, fm, worker_examples),
        training_flops=training_flops(fm.model, layout.inputs(dense_features)),
        last_use_bytes=last_use_bytes,
    )


def activation_bytes(
    network: nn.Module,
    layout: Layout,
    fm: FMConfig,
    dense_features: int,
    examples: int,
) -> int:
    """Return the bytes that the interaction model saves for the backward pass.

    They are counted in a forward pass of the model itself on torch's meta device.

    Args:
        network: on the meta device; it is converted to the dtype of `fm.precision`.
        layout: of the model's embedding rows.
        fm: the trainer's settings.
        dense_features: number of dense features.
        examples: number of examples in the pass.
    """
    dtype = torch.bfloat16 if fm.precision == "bf16" else torch.float32
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # the reference keeps the address from being reused
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with torch.device("meta"), hooks:
        embedded_BRE = torch.empty(
            examples, layout.rows, fm.model.dim, dtype=dtype, requires_grad=True
        )
        dense_BD = torch.empty(examples, dense_features, dtype=dtype)
        network.to(dtype)(embedded_BRE, dense_BD)

    for tensor in (*network.parameters(), *network.buffers()):
        saved.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in saved.values())


def lookup_bytes(
    shards: tuple[TableShards, ...],
    layout: Layout,
    fm: FMConfig,
    examples: int,
) -> Ints:
    """Return the bytes of a step's float32 embedding rows on each worker.

    These are the rows of its examples and their gradient. With several workers each one also holds
    the rows that it looks up in its shards for the examples of all workers.

    Args:
        shards: the tables over the workers.
        layout: of the model's embedding rows.
        fm: the trainer's settings.
        examples: examples of a batch on each worker.
    """
    rows_W = np.full(fm.workers, 2 * layout.rows * examples, np.int64)
    if fm.workers > 1:
        batch_examples = examples * fm.workers
        rows_per_example = _rows_per_example(layout)
        for shard in shards:
            holds_rows_W = shard.rows_W > 0
            looked_up = rows_per_example[shard.name] * batch_examples
            rows_W += holds_rows_W * looked_up
    row_bytes = FLOAT_BYTES * fm.model.dim
    return rows_W * row_bytes


def _rows_per_example(layout: Layout) -> dict[str, int]:
    """Return how many embedding rows an example reads from each table."""
    rows = dict.fromkeys(layout.embeddings, 0)
    for slot in layout.single:
        rows[slot.table] += slot.width
    for slot in layout.bags:
        rows[slot.table] += slot.width
    return rows
