"""L2 regularization of the table rows that a step uses.

A row is decayed once per step, however many examples read it, so rare ids, about which the data say
least, are regularized most. fbgemm's fused row-wise Adagrad accepts a weight decay but silently
ignores it on a CPU. Here the decay is added to the gradient that reaches the tables, on every
device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from exfm_ray.models.layout import Layout
from exfm_ray.schema import Schema


class RowCounts:
    """Counts how often a batch reads each row of a table by its single-valued features."""

    def __init__(self, schema: Schema) -> None:
        tables = list(schema.tables)
        numbers = [tables.index(feature.table or feature.name) for feature in schema.single]
        # The table's number goes above the row number, so ids of different tables differ.
        self._table_S = np.array(numbers, np.int64) << 32

    def count(self, sparse_NS: np.ndarray[Any, Any]) -> Tensor:
        """Return for every id of a batch how often its row occurs in the batch.

        Args:
            sparse_NS: packed ids of a global batch.

        Returns:
            int64 (N, S).
        """
        row_NS = sparse_NS + self._table_S
        _, unique_NS, count_U = np.unique(row_NS, return_inverse=True, return_counts=True)
        count_NS = count_U[unique_NS].reshape(sparse_NS.shape)
        return torch.from_numpy(count_NS)


class RowDecay:
    """Adds weight_decay * row to the gradient of every row that single-valued features read.

    The rows of bags are left alone.
    """

    def __init__(
        self,
        layout: Layout,
        weight_decay: float,
        workers: int,
    ) -> None:
        """Store the decay.

        Args:
            layout: of the model's embedding rows.
            weight_decay: coefficient of the row.
            workers: number of workers; the tables' gradients are means over them.
        """
        columns = []
        for column, slot in enumerate(layout.single):
            columns += [column] * slot.width
        self._column_X = torch.tensor(columns)
        self._bag_rows = layout.rows - len(columns)
        self._scale = weight_decay * workers

    def __call__(self, embedded_BRE: Tensor, repeats_BS: Tensor) -> Tensor:
        """Return the rows unchanged, with the decay added to their gradient.

        Args:
            embedded_BRE: the embedding rows of a batch.
            repeats_BS: how often each row occurs in the global batch, 0 for padding.
        """
        scale_BS = torch.where(repeats_BS > 0, self._scale / repeats_BS, 0.0)
        column_X = self._column_X.to(scale_BS.device)
        scale_BX = scale_BS[:, column_X]
        scale_BR = torch.nn.functional.pad(scale_BX, (0, self._bag_rows))
        decayed: Tensor = _AddDecay.apply(embedded_BRE, scale_BR.unsqueeze(2))  # type: ignore[no-untyped-call]
        return decayed


class _AddDecay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embedded_BRE: Tensor,
        scale_BR1: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(embedded_BRE, scale_BR1)
        return embedded_BRE.view_as(embedded_BRE)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        embedded_BRE, scale_BR1 = ctx.saved_tensors
        decayed = torch.addcmul(gradients[0], embedded_BRE, scale_BR1)
        return decayed, None
