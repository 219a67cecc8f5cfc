"""The served graph: a student's tables and network as one module made of operators that
torch.export and ONNX both have.

It computes what `LocalModel.score` computes. Only the lookup is a second implementation, because
`embedding_bag` has no ONNX form and `expand_bags` makes tensors whose size depends on the values of
others. Here every size follows from the inputs' shapes.

Shape suffixes as in `exfm_ray.data.batch`; X = M * B, P embedded rows that are means of bags, U
embedded rows of single positions of bags, O = P + U, K the most embeddings per id of a table that
bags read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exfm_ray.data.batch import Batch
from exfm_ray.models.layout import POOLED, Layout, Slot, table_of
from exfm_ray.models.network import Network
from exfm_ray.models.serialization import LocalModel, StoredModel
from exfm_ray.schema import Schema


class ServedTables(nn.Module):
    """All tables in one parameter, ordered by name.

    This is the order of a safetensors file, so one tensor can stand for the whole file.

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
        tables: Mapping[str, Tensor],
        dim: int,
    ) -> None:
        """Stack the tables and compute where each embedded row comes from.

        Args:
            layout: the slots of the model.
            schema: schema of the model's inputs.
            tables: name -> float32 (rows, embeddings times E).
            dim: E.
        """
        super().__init__()
        stacked: list[Tensor] = []
        first_row: dict[str, int] = {}
        total_rows = 0
        for name in sorted(tables):
            rows = tables[name].reshape(-1, dim)
            stacked.append(rows)
            first_row[name] = total_rows
            total_rows += len(rows)
        self.weight = nn.Parameter(torch.cat(stacked))

        self._register_single(layout, first_row)
        self._register_bag_tables(layout, schema, first_row)
        self._register_bag_rows(layout, first_row)

    def _register_single(self, layout: Layout, first_row: Mapping[str, int]) -> None:
        """Register the lookup of single-valued features: row = id * scale + offset."""
        rows = _slot_rows(range(len(layout.single)), layout.single)
        offsets = [first_row[row.slot.table] + row.embedding for row in rows]
        self._register("single_S", [row.source for row in rows])
        self._register("single_scale_S", [row.slot.width for row in rows])
        self._register("single_offset_S", offsets)

    def _register_bag_tables(
        self,
        layout: Layout,
        schema: Schema,
        first_row: Mapping[str, int],
    ) -> None:
        """Register the lookup of whole bags: K rows per value, as many for every bag.

        A table with fewer embeddings repeats its last one; `mean_P` skips the repeated rows.
        """
        tables = [table_of(feature) for feature in schema.bags]
        scales = [layout.embeddings[table] for table in tables]
        self.most = max(scales, default=1)

        offsets = []
        for table in tables:
            last = layout.embeddings[table] - 1
            embeddings = [min(k, last) for k in range(self.most)]
            offsets.append([first_row[table] + embedding for embedding in embeddings])
        self._register("scale_M", scales)
        self._register("offset_MK", offsets)

    def _register_bag_rows(self, layout: Layout, first_row: Mapping[str, int]) -> None:
        """Register which embedded rows are means, which are single positions, and their order."""
        rows = _slot_rows(layout.bag_of_O, layout.bags)
        means = [row for row in rows if row.slot.position == POOLED]
        positions = [row for row in rows if row.slot.position != POOLED]
        offsets = [first_row[row.slot.table] + row.embedding for row in positions]

        self._register("mean_P", [row.source * self.most + row.embedding for row in means])
        self._register("bag_U", [row.source for row in positions])
        self._register("position_U", [row.slot.position for row in positions])
        self._register("scale_U", [row.slot.width for row in positions])
        self._register("offset_U", offsets)

        place = {row: i for i, row in enumerate([*means, *positions])}
        self._register("order_O", [place[row] for row in rows])

    def _register(self, name: str, values: list[int] | list[list[int]]) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(
        self,
        sparse_BS: Tensor,
        bag_values_V: Tensor | None,
        bag_lengths_MB: Tensor | None,
    ) -> Tensor:
        """Embed the tensors of a `Batch`, as `LocalTables.embed` does.

        Args:
            sparse_BS: ids of the single-valued features.
            bag_values_V: values of the bags; None if the schema has no bags.
            bag_lengths_MB: number of values of each bag; None if the schema has no bags.

        Returns:
            embedded_BRE.
        """
        ids_BS = sparse_BS[:, self.single_S] * self.single_scale_S + self.single_offset_S
        single_BRE = F.embedding(ids_BS, self.weight)
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

        # The bag of value v is the last of those that start at or before v; a bag that starts at V
        # is empty.
        starts_X = (ends_MB - lengths_MB).flatten()
        zeros = values_V.new_zeros(V + 1)
        starting_V = zeros.scatter_add(0, starts_X, torch.ones_like(starts_X))[:V]
        bag_V = starting_V.cumsum(0) - 1

        m_V = bag_V // B
        ids_V = values_V * self.scale_M[m_V]
        rows_VK = ids_V.unsqueeze(1) + self.offset_MK[m_V]
        embedded_VX = F.embedding(rows_VK, self.weight).view(V, self.most * E)

        zeros = embedded_VX.new_zeros(M * B, self.most * E)
        sums_XX = zeros.index_put((bag_V,), embedded_VX, accumulate=True)
        counts_X = lengths_MB.flatten().clamp(min=1)
        means_XX = sums_XX / counts_X.unsqueeze(1)
        means_BMKE = means_XX.view(M, B, self.most, E).permute(1, 0, 2, 3)
        means_BRE = means_BMKE.reshape(B, M * self.most, E)
        return means_BRE[:, self.mean_P]

    def _positions(
        self,
        values_V: Tensor,
        lengths_MB: Tensor,
        ends_MB: Tensor,
    ) -> Tensor:
        """Rows of single positions of bags, (B, U, E); zeros beyond the end of a bag."""
        lengths_BU = lengths_MB[self.bag_U].T
        ends_BU = ends_MB[self.bag_U].T
        present_BU = self.position_U < lengths_BU

        # Index 0 stands for all absent values, so a value moves up by one.
        newest_first_BU = ends_BU - self.position_U
        index_BU = torch.where(present_BU, newest_first_BU, torch.zeros_like(ends_BU))
        value_BU = F.pad(values_V, (1, 0))[index_BU]
        rows_BU = value_BU * self.scale_U + self.offset_U
        rows_BUE = F.embedding(rows_BU, self.weight)
        return rows_BUE * present_BU.unsqueeze(2).to(rows_BUE.dtype)


class _SlotRow(NamedTuple):
    """One embedded row of a slot.

    Attributes:
        source: the column of sparse_BS, or the bag, that its ids come from.
        slot: the slot.
        embedding: number of the embedding among those of an id.
    """

    source: int
    slot: Slot
    embedding: int


def _slot_rows(sources: Sequence[int], slots: Sequence[Slot]) -> list[_SlotRow]:
    """The embedded rows of slots in order; `sources` has one source per slot."""
    rows = []
    for source, slot in zip(sources, slots, strict=True):
        rows += [_SlotRow(source, slot, embedding) for embedding in range(slot.width)]
    return rows


class ServedGraph(nn.Module):
    """Tables, network and sigmoid: from the tensors of a `Batch` to probabilities."""

    def __init__(self, tables: ServedTables, network: Network) -> None:
        super().__init__()
        self.tables = tables
        self.network = network

    @classmethod
    def from_model(cls, model: LocalModel, stored: StoredModel) -> ServedGraph:
        """Build the served form of a loaded model.

        Its network is shared and frozen; its tables are copied.
        """
        schema = stored.example
        config = stored.network
        layout = Layout.from_config(config, schema)
        tables = ServedTables(layout, schema, model.tables.tables(), config.dim)
        return cls(tables, model.network).eval().requires_grad_(False)

    def forward(
        self,
        sparse_BS: Tensor,
        dense_BD: Tensor | None = None,
        bag_values_V: Tensor | None = None,
        bag_lengths_MB: Tensor | None = None,
    ) -> Tensor:
        """Compute float32 probabilities_BT.

        An input that the schema does not have (dense features, bags) is None.
        """
        if dense_BD is None:
            dense_BD = self.tables.weight.new_zeros(sparse_BS.shape[0], 0)
        embedded_BRE = self.tables(sparse_BS, bag_values_V, bag_lengths_MB)
        logits_BT = self.network(embedded_BRE, dense_BD)
        return torch.sigmoid(logits_BT.float())


def input_names(schema: Schema) -> list[str]:
    """Names of the graph's inputs: the tensors of a `Batch` that the schema has."""
    names = ["sparse_BS"]
    if schema.dense:
        names.append("dense_BD")
    if schema.bags:
        names += ["bag_values_V", "bag_lengths_MB"]
    return names


def inputs_of(schema: Schema, batch: Batch) -> dict[str, Tensor]:
    """Turn a batch into the graph's inputs by name.

    They are contiguous, because a compiled program assumes that and does not check it.
    """
    names = input_names(schema)
    return {name: getattr(batch, name).contiguous() for name in names}
