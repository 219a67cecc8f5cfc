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
        dense_BD: float32, normalised.
        labels_BT: float32, 0 or 1; to learn also NaN, where none is known, and
            `data.corrections.CORRECTED`.
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
        return Batch(*(t.to(device, non_blocking=True) for t in vars(self).values()))

    def split(self, size: int) -> Iterator[Batch]:
        """Batches of `size` rows (the last one shorter), in order; rows are views, values of bags
        are copied."""
        M, B = self.bag_lengths_MB.shape
        bounds_MB = F.pad(self.bag_lengths_MB.flatten().cumsum(0), (1, 0))
        for start in range(0, B, size):
            stop = min(start + size, B)
            values = [
                self.bag_values_V[bounds_MB[m * B + start] : bounds_MB[m * B + stop]]
                for m in range(M)
            ]
            yield Batch(
                sparse_BS=self.sparse_BS[start:stop],
                bag_values_V=torch.cat(values) if values else self.bag_values_V,
                bag_lengths_MB=self.bag_lengths_MB[:, start:stop],
                dense_BD=self.dense_BD[start:stop],
                labels_BT=self.labels_BT[start:stop],
            )


def to_batch(table: pa.Table, schema: Schema) -> Batch:
    """Packed columns of a fragment, or of a slice of one, as tensors."""
    rows = table.num_rows
    values = [np.empty(0, np.int64)]
    lengths = [np.empty((0, rows), np.int64)]
    for bag in schema.bags:
        column = table[bag.name].combine_chunks()
        offsets = (
            column.offsets.to_numpy()[: rows + 1].astype(np.int64)
            if rows
            else np.zeros(1, np.int64)
        )
        values.append(column.flatten().to_numpy(zero_copy_only=False).astype(np.int64))
        lengths.append(np.diff(offsets)[None])
    return Batch(
        sparse_BS=_tensor(list_values(table["sparse"], len(schema.single)).astype(np.int64)),
        bag_values_V=_tensor(np.concatenate(values)),
        bag_lengths_MB=_tensor(np.concatenate(lengths)),
        dense_BD=_tensor(
            list_values(table["dense"], len(schema.dense))
            if schema.dense
            else np.zeros((rows, 0), np.float32)
        ),
        labels_BT=_tensor(list_values(table["labels"], len(schema.tasks))),
    )


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor over an array; read-only arrays (shared memory) are copied, for torch cannot protect
    them."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
