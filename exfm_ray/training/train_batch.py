"""Rows of a global batch as the tensors that the trainers of a group learn from.

Shape suffixes: N rows of a global batch, B rows of this worker's slice (padded to the same length
on all workers), S single-valued features, F history inputs, D dense features, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from exfm_ray.data.batch import Batch, to_batch
from exfm_ray.data.feed import WorkerSlice, worker_slice
from exfm_ray.data.stream import list_values
from exfm_ray.engine.row_weight_decay import RowCounts
from exfm_ray.schema import Schema
from exfm_ray.stores.supervision import teacher_values
from exfm_ray.stores.user_history import HISTORY_COLUMN


@dataclass(frozen=True)
class TrainBatch:
    """This worker's slice of a global batch.

    Attributes:
        features: the examples, with the labels of all tasks of the stream.
        weight_B: float32, makes the sum over this worker's rows the mean over the global batch
            after averaging over workers. It is 0 for padding rows.
        teacher_BT: float32, the teacher's probabilities for the student's tasks, or (K, B, T) for
            K stacked models. None if the window has no supervision.
        repeats_BS: int64, how many ids of the global batch read the same table row; 0 for padding
            rows. None if no trainer needs it.
        history_BF: float32, the history inputs of each example's user. None if the rows have none.
    """

    features: Batch
    weight_B: Tensor
    teacher_BT: Tensor | None = None
    repeats_BS: Tensor | None = None
    history_BF: Tensor | None = None

    def inputs(self, uses_history: bool) -> Batch:
        """The examples as a model reads them."""
        return model_inputs(self.features, self.history_BF, uses_history)


@dataclass
class BatchParser:
    """Turns the rows of a global batch into this worker's tensors.

    Attributes:
        teacher_columns: which of the `teacher_tasks` prediction columns belong to the trainers'
            tasks, in their order. One sequence for each model if the models are stacked.
        counts_rows: True if a trainer needs `TrainBatch.repeats_BS`.
    """

    schema: Schema
    device: torch.device
    teacher_columns: Sequence[int] | Sequence[Sequence[int]]
    teacher_tasks: int
    counts_rows: bool
    _row_counts: RowCounts | None = field(init=False)

    def __post_init__(self) -> None:
        self._rank = dist.get_rank()
        self._world_size = dist.get_world_size()
        self._row_counts = RowCounts(self.schema) if self.counts_rows else None

    def local_slice(self, rows: pa.Table) -> WorkerSlice:
        """This worker's rows of a global batch."""
        return worker_slice(rows, self._rank, self._world_size)

    def features(self, local: WorkerSlice) -> tuple[Batch, Tensor | None]:
        """The examples of a slice and, if the rows have it, the history of their users."""
        batch = to_batch(local.table, self.schema)
        features = pad(batch, local.length).to(self.device)
        if HISTORY_COLUMN not in local.table.column_names:
            return features, None

        column_type = local.table.schema.field(HISTORY_COLUMN).type
        values = list_values(local.table[HISTORY_COLUMN], column_type.list_size)
        history_BF = torch.from_numpy(values.copy())
        padded_BF = _pad_rows(history_BF, local.length)
        return features, padded_BF.to(self.device)

    def train_batch(self, rows: pa.Table) -> TrainBatch:
        """This worker's part of the global batch `rows`."""
        local = self.local_slice(rows)
        features, history_BF = self.features(local)
        weight_B = torch.zeros(local.length, device=self.device)
        weight_B[: local.table.num_rows] = self._world_size / local.total
        return TrainBatch(
            features=features,
            weight_B=weight_B,
            teacher_BT=self._teacher(local),
            repeats_BS=self._repeats(rows, local),
            history_BF=history_BF,
        )

    def _teacher(self, local: WorkerSlice) -> Tensor | None:
        values = teacher_values(local.table, self.teacher_tasks)
        if values is None:
            return None
        columns = np.array(self.teacher_columns)
        selected = torch.from_numpy(values[:, columns])
        teacher_BT = selected.movedim(0, -2)  # (K, B, T) for stacked models
        padded_BT = _pad_rows(teacher_BT, local.length)
        return padded_BT.to(self.device)

    def _repeats(self, rows: pa.Table, local: WorkerSlice) -> Tensor | None:
        if self._row_counts is None:
            return None
        sparse_NS = list_values(rows["sparse"], len(self.schema.single))
        repeats_NS = self._row_counts.count(sparse_NS)
        first = self._rank * local.length
        repeats_BS = repeats_NS[first : first + local.length]
        padded_BS = _pad_rows(repeats_BS, local.length)
        return padded_BS.to(self.device)


def model_inputs(
    features: Batch,
    history_BF: Tensor | None,
    uses_history: bool,
) -> Batch:
    """The examples as a model reads them: its history inputs follow the dense features."""
    if history_BF is None or not uses_history:
        return features
    return replace(features, dense_BD=torch.cat([features.dense_BD, history_BF], dim=1))


def pad(batch: Batch, length: int) -> Batch:
    """Append rows of missing values up to `length`, so that all workers take equal steps."""
    missing = length - len(batch)
    if missing <= 0:
        return batch
    return Batch(
        sparse_BS=_pad_rows(batch.sparse_BS, length),
        bag_values_V=batch.bag_values_V,
        bag_lengths_MB=F.pad(batch.bag_lengths_MB, (0, missing)),
        dense_BD=_pad_rows(batch.dense_BD, length),
        labels_BT=_pad_rows(batch.labels_BT, length),
    )


def _pad_rows(values: Tensor, length: int) -> Tensor:
    """Append zeros along the last but one axis up to `length`."""
    return F.pad(values, (0, 0, 0, length - values.shape[-2]))
