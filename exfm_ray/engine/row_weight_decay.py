"""L2 on the rows that a step uses: once per row and step, however many examples read it.

So rare ids, which the data say least of, are held back most. fbgemm's fused row-wise Adagrad takes
a weight decay but ignores it on a CPU, silently; here it is added to the gradient that reaches the
tables, on every device.
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
        self._table_S = (
            np.array([tables.index(f.table or f.name) for f in schema.single], np.int64) << 32
        )

    def count(self, sparse_NS: np.ndarray[Any, Any]) -> Tensor:
        """For the packed ids of a global batch, how many of its examples' ids are that row: int64
        (N, S)."""
        _, place_X, count_U = np.unique(
            sparse_NS + self._table_S, return_inverse=True, return_counts=True
        )
        return torch.from_numpy(count_U[place_X].reshape(sparse_NS.shape))


class RowDecay:
    """Adds weight_decay * row to the gradient of every row that single-valued features read; bags'
    rows are left alone."""

    def __init__(
        self,
        layout: Layout,
        weight_decay: float,
        workers: int,
    ) -> None:
        """`workers`: the tables' gradients are means over them."""
        self._column_X = torch.tensor(
            [column for column, slot in enumerate(layout.single) for _ in range(slot.width)]
        )
        self._bags = layout.rows - len(self._column_X)
        self._scale = weight_decay * workers

    def __call__(self, embedded_BRE: Tensor, repeats_BS: Tensor) -> Tensor:
        """The rows as they are; their gradient with the decay added. `repeats_BS` is 0 for rows
        that only fill up a share."""
        scale_BS = torch.where(repeats_BS > 0, self._scale / repeats_BS, 0.0)
        scale_BR = torch.nn.functional.pad(
            scale_BS[:, self._column_X.to(scale_BS.device)], (0, self._bags)
        )
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
        return torch.addcmul(gradients[0], embedded_BRE, scale_BR1), None
