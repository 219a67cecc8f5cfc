"""The served graph: a student's tables and network as one module made of operators that
torch.export and ONNX both have.

It computes what `LocalModel.score` computes. Only the lookup is written anew: `embedding_bag` has
no ONNX form, and `expand_bags` makes tensors whose size depends on what is in others. Here every
size follows from the inputs' shapes.

Shape suffixes as in `exfm_ray.data.batch`; X = M * B, P embedded rows that are means of bags, U
those of single positions of bags, K the most embeddings that a table read by bags has for an id.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exfm_ray.data.batch import Batch
from exfm_ray.models.layout import POOLED, Layout
from exfm_ray.models.network import Network
from exfm_ray.models.serialization import LocalModel, StoredModel
from exfm_ray.schema import Schema


class ServedTables(nn.Module):
    """All tables in one parameter, in the order of their names: that of a safetensors file, so that
    one tensor can stand for it.

    Attributes:
        weight: float32 (sum over the tables of rows times embeddings, E).
    """

    single_S: Tensor
    single_scale_S: Tensor
    single_offset_S: Tensor
    mean_P: Tensor
    bag_U: Tensor
    position_U: Tensor
    scale_U: Tensor
    offset_U: Tensor
    scale_M: Tensor
    offset_MK: Tensor
    order_O: Tensor

    def __init__(
        self,
        layout: Layout,
        schema: Schema,
        tables: dict[str, Tensor],
        dim: int,
    ) -> None:
        """`tables`: name to float32 (rows, embeddings times E)."""
        super().__init__()
        stacked = [tables[name].reshape(-1, dim) for name in sorted(tables)]
        first = dict(
            zip(sorted(tables), [0, *accumulate(len(table) for table in stacked)], strict=False)
        )
        self.weight = nn.Parameter(torch.cat(stacked))

        each = [
            (column, slot, k)
            for column, slot in enumerate(layout.single)
            for k in range(slot.width)
        ]
        self._numbers("single_S", [column for column, _, _ in each])
        self._numbers("single_scale_S", [slot.width for _, slot, _ in each])
        self._numbers("single_offset_S", [first[slot.table] + k for _, slot, k in each])

        owners = [bag.table or bag.name for bag in schema.bags]
        self.most = max((layout.embeddings[table] for table in owners), default=1)
        self._numbers("scale_M", [layout.embeddings[table] for table in owners])
        self._numbers(
            "offset_MK",
            [
                [first[table] + min(k, layout.embeddings[table] - 1) for k in range(self.most)]
                for table in owners
            ],
        )

        each = [
            (bag, slot, k)
            for bag, slot in zip(layout.bag_of_O, layout.bags, strict=True)
            for k in range(slot.width)
        ]
        means = [row for row, (_, slot, _) in enumerate(each) if slot.position == POOLED]
        others = [row for row, (_, slot, _) in enumerate(each) if slot.position != POOLED]
        self._numbers("mean_P", [each[row][0] * self.most + each[row][2] for row in means])
        self._numbers("bag_U", [each[row][0] for row in others])
        self._numbers("position_U", [each[row][1].position for row in others])
        self._numbers("scale_U", [each[row][1].width for row in others])
        self._numbers("offset_U", [first[each[row][1].table] + each[row][2] for row in others])
        self._numbers("order_O", [(means + others).index(row) for row in range(len(each))])

    def _numbers(self, name: str, values: list[int] | list[list[int]]) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(
        self,
        sparse_BS: Tensor,
        bag_values_V: Tensor | None,
        bag_lengths_MB: Tensor | None,
    ) -> Tensor:
        """The tensors of a `Batch` to embedded_BRE, as `LocalTables.embed`; the bags are None where
        the schema has none."""
        single_BRE = F.embedding(
            sparse_BS[:, self.single_S] * self.single_scale_S + self.single_offset_S, self.weight
        )
        if bag_values_V is None or bag_lengths_MB is None:
            return single_BRE
        ends_MB = bag_lengths_MB.flatten().cumsum(0).view_as(bag_lengths_MB)
        rows = []
        if len(self.mean_P):
            rows.append(self._means(bag_values_V, bag_lengths_MB, ends_MB))
        if len(self.bag_U):
            rows.append(self._positions(bag_values_V, bag_lengths_MB, ends_MB))
        bags_BRE = torch.cat(rows, dim=1)[:, self.order_O] if len(rows) > 1 else rows[0]
        return torch.cat([single_BRE, bags_BRE], dim=1)

    def _means(
        self,
        values_V: Tensor,
        lengths_MB: Tensor,
        ends_MB: Tensor,
    ) -> Tensor:
        """Mean rows of bags, (B, P, E); zeros for an empty bag."""
        M, B = lengths_MB.shape
        V = values_V.shape[0]
        E = self.weight.shape[1]
        starts_X = (ends_MB - lengths_MB).flatten()
        # The bag of value v is the last of those that start at or before v; a bag that starts at V
        # is empty.
        begun_V = (
            values_V.new_zeros(V + 1)
            .scatter_add(0, starts_X, torch.ones_like(starts_X))[:V]
            .cumsum(0)
        )
        bag_V = begun_V - 1
        m_V = bag_V // B
        rows_VK = (values_V * self.scale_M[m_V]).unsqueeze(1) + self.offset_MK[m_V]
        rows_VX = F.embedding(rows_VK, self.weight).view(V, self.most * E)
        sums_XX = rows_VX.new_zeros(M * B, self.most * E).index_put(
            (bag_V,), rows_VX, accumulate=True
        )
        means_XX = sums_XX / lengths_MB.flatten().clamp(min=1).unsqueeze(1)
        means_BRE = (
            means_XX.view(M, B, self.most, E).permute(1, 0, 2, 3).reshape(B, M * self.most, E)
        )
        return means_BRE[:, self.mean_P]

    def _positions(
        self,
        values_V: Tensor,
        lengths_MB: Tensor,
        ends_MB: Tensor,
    ) -> Tensor:
        """Rows of single positions of bags, the newest first, (B, U, E); zeros beyond the end of a
        bag."""
        lengths_BU = lengths_MB[self.bag_U].T
        ends_BU = ends_MB[self.bag_U].T
        present_BU = self.position_U < lengths_BU
        index_BU = torch.where(present_BU, ends_BU - self.position_U, torch.zeros_like(ends_BU))
        value_BU = F.pad(values_V, (1, 0))[index_BU]  # value 0 stands for all that are absent
        rows_BUE = F.embedding(value_BU * self.scale_U + self.offset_U, self.weight)
        return rows_BUE * present_BU.unsqueeze(2).to(rows_BUE.dtype)


class ServedGraph(nn.Module):
    """Tables, network and the sigmoid: from the tensors of a `Batch` to probabilities."""

    def __init__(self, tables: ServedTables, network: Network) -> None:
        super().__init__()
        self.tables = tables
        self.network = network

    @classmethod
    def from_model(cls, model: LocalModel, stored: StoredModel) -> ServedGraph:
        """The served form of a loaded model; its network is shared, and frozen; its tables are
        copied."""
        schema = stored.example
        config = stored.network
        tables = ServedTables(
            Layout.from_config(config, schema), schema, model.tables.tables(), config.dim
        )
        return cls(tables, model.network).eval().requires_grad_(False)

    def forward(
        self,
        sparse_BS: Tensor,
        dense_BD: Tensor | None = None,
        bag_values_V: Tensor | None = None,
        bag_lengths_MB: Tensor | None = None,
    ) -> Tensor:
        """Probabilities_BT, float32. What the schema does not have (dense features, bags) is no
        input: None."""
        if dense_BD is None:
            dense_BD = self.tables.weight.new_zeros(sparse_BS.shape[0], 0)
        logits_BT = self.network(self.tables(sparse_BS, bag_values_V, bag_lengths_MB), dense_BD)
        return torch.sigmoid(logits_BT.float())


def input_names(schema: Schema) -> list[str]:
    """The graph's inputs: tensors of a `Batch`, those that the schema has."""
    return [
        "sparse_BS",
        *(["dense_BD"] if schema.dense else []),
        *(["bag_values_V", "bag_lengths_MB"] if schema.bags else []),
    ]


def inputs_of(schema: Schema, batch: Batch) -> dict[str, Tensor]:
    """A batch as the graph's inputs, by name. They are contiguous: a compiled program reads them
    so, unasked, whatever they are."""
    return {name: getattr(batch, name).contiguous() for name in input_names(schema)}
