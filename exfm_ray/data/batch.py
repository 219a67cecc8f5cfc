"""Packed rows as tensors: the form in which models, trainers and scorers take examples.

Shape suffixes here and in `models`: B batch, S single-valued features, M bags (multi-valued and
sequence features), R embedded rows (see `models.layout`), D dense features, T tasks, V values of
all bags together, E embedding dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from exfm_ray.data.stream import list_values
from exfm_ray.schema import Schema


@dataclass(frozen=True)
class Batch:
    """Rows of the stream.

    Attributes:
        sparse_BS: int64, table rows of the single-valued features.
        bag_values_V: int64, table rows of the bags, bag after bag, example after example.
        bag_lengths_MB: int64, how many values each bag has in each example.
        dense_BD: float32, normalized.
        labels_BT: float32, 0 or 1. In batches to learn from also NaN, where no label is known, and
            `data.labels.corrections.CORRECTED`.
    """

    sparse_BS: Tensor
    bag_values_V: Tensor
    bag_lengths_MB: Tensor
    dense_BD: Tensor
    labels_BT: Tensor

    def __len__(self) -> int:
        return self.sparse_BS.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        tensors = vars(self).values()
        moved = [tensor.to(device, non_blocking=True) for tensor in tensors]
        return Batch(*moved)

    def split(self, size: int) -> Iterator[Batch]:
        """Yield batches of `size` rows in order; the last one may be shorter.

        Rows are views; values of bags are copied.
        """
        M, B = self.bag_lengths_MB.shape
        ends_MB = self.bag_lengths_MB.flatten().cumsum(0)
        bounds_MB = F.pad(ends_MB, (1, 0))
        for start in range(0, B, size):
            stop = min(start + size, B)
            values = []
            for m in range(M):
                first = bounds_MB[m * B + start]
                last = bounds_MB[m * B + stop]
                values.append(self.bag_values_V[first:last])
            yield Batch(
                sparse_BS=self.sparse_BS[start:stop],
                bag_values_V=torch.cat(values) if values else self.bag_values_V,
                bag_lengths_MB=self.bag_lengths_MB[:, start:stop],
                dense_BD=self.dense_BD[start:stop],
                labels_BT=self.labels_BT[start:stop],
            )


def to_batch(table: pa.Table, schema: Schema) -> Batch:
    """Convert packed columns of a fragment, or of a slice of one, to tensors."""
    rows = table.num_rows
    values = [np.empty(0, np.int64)]
    lengths = [np.empty((0, rows), np.int64)]
    for bag in schema.bags:
        column = table[bag.name].combine_chunks()
        values_V, lengths_B = _bag(column, rows)
        values.append(values_V)
        lengths.append(lengths_B[None])

    sparse_BS = list_values(table["sparse"], len(schema.single))
    dense_BD = np.zeros((rows, 0), np.float32)
    if schema.dense:
        dense_BD = list_values(table["dense"], len(schema.dense))
    labels_BT = list_values(table["labels"], len(schema.tasks))
    return Batch(
        sparse_BS=_tensor(sparse_BS.astype(np.int64)),
        bag_values_V=_tensor(np.concatenate(values)),
        bag_lengths_MB=_tensor(np.concatenate(lengths)),
        dense_BD=_tensor(dense_BD),
        labels_BT=_tensor(labels_BT),
    )


def _bag(column: pa.ListArray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of all lists of a column, and the length of each list: two int64 arrays."""
    offsets = np.zeros(1, np.int64)
    if rows:
        offsets = column.offsets.to_numpy()[: rows + 1].astype(np.int64)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    values_V = flat.astype(np.int64)
    lengths_B = np.diff(offsets)
    return values_V, lengths_B


def _tensor(array: np.ndarray) -> Tensor:
    """Wrap an array as a tensor. A read-only array (shared memory) is copied, because torch cannot
    protect it."""
    writable = array
    if not array.flags.writeable:
        writable = array.copy()
    return torch.from_numpy(writable)
