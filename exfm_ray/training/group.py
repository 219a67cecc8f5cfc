"""Models of one domain that see the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
from exfm_ray.training.model_trainer import ModelTrainer
from exfm_ray.training.row_usage import RowLastUse
from exfm_ray.training.table_sharing import TableSharing


@dataclass
class Predictions:
    """Rows of a window in order, with what each lane says of them.

    Attributes:
        logits: lane -> float32 (N, tasks of the lane).
        labels_NT: float32, all tasks of the stream.
        domain_N, group_N: int32; the domain, and the id by which AUC is grouped (0 where the schema
            groups by nothing).
    """

    logits: dict[str, np.ndarray]
    labels_NT: np.ndarray
    domain_N: np.ndarray
    group_N: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """One after the other."""
        return cls(
            {name: np.concatenate([p.logits[name] for p in parts]) for name in parts[0].logits},
            *(
                np.concatenate([getattr(p, column) for p in parts])
                for column in ("labels_NT", "domain_N", "group_N")
            ),
        )


@dataclass
class BatchGroup:
    """Lanes that see the same rows: one domain's, or all (`domain` None).

    Attributes:
        teacher_columns: which of the `teacher_tasks` columns of predictions are the lanes' tasks,
            in their order; where the lane teaches several models, those of each of them.
        evict_after_windows: after how many windows without use a row is reset; None: never.
        sharing: where its arms with +share find the teacher's table rows.
    """

    schema: Schema
    lanes: Sequence[ModelTrainer]
    domain: int | None
    batch_size: int
    device: torch.device
    teacher_columns: Sequence[int] | Sequence[Sequence[int]] = ()
    teacher_tasks: int = 0
    evict_after_windows: int | None = None
    sharing: TableSharing | None = None
    _usage: RowLastUse | None = field(init=False)

    def __post_init__(self) -> None:
        self._usage = (
            RowLastUse(self.schema, self.evict_after_windows) if self.evict_after_windows else None
        )
        names = [f.name for f in self.schema.single]
        self._group_column = names.index(self.schema.group_by) if self.schema.group_by else None
        self._worker = dist.get_rank()
        self._workers = dist.get_world_size()
        self._repeats = (
            RowCounts(self.schema) if any(lane.engine.decays for lane in self.lanes) else None
        )

    def select(self, table: pa.Table) -> pa.Table:
        """The group's rows of a fragment."""
        return (
            table if self.domain is None else table.filter(pc.equal(table["domain"], self.domain))
        )

    def begin_window(self, window: int) -> None:
        """A window is going to be evaluated: give the arms with +share the rows of its ids."""
        lanes = [lane for lane in self.lanes if lane.arm and lane.arm.shares_tables]
        if self.sharing and lanes:
            rows = self.sharing.rows(window)
            for lane in lanes:
                lane.engine.give_rows(rows, self.sharing.weight)

    def refresh(self, windows: int) -> None:
        """So many windows are learnt: give the arms with +share all of the teacher's rows that are
        known now, to be served with."""
        lanes = [lane for lane in self.lanes if lane.arm and lane.arm.shares_tables]
        if self.sharing and lanes:
            for rows in self.sharing.rows_after(windows):
                for lane in lanes:
                    lane.engine.give_rows(rows, self.sharing.weight)

    def mark(self, rows: pa.Table) -> None:
        """These rows, of a fragment, are going to be learnt."""
        if self.sharing:
            self.sharing.mark(rows)
        if self._usage:
            self._usage.mark(rows)

    def end_window(self) -> None:
        """A window is learnt: reset the table rows that have been out of use for too long."""
        if self.sharing:
            self.sharing.end_window()
        if self._usage:
            stale = self._usage.end_window()
            for lane in self.lanes:
                lane.engine.reset_rows(stale)

    @property
    def usage(self) -> RowLastUse | None:
        """When rows were last used, where unused ones are reset; the same on all workers."""
        return self._usage

    def learn(self, rows: pa.Table) -> None:
        """One step of every lane on a global batch."""
        mine = worker_slice(rows, self._worker, self._workers)
        batches = self._batches(mine)
        repeats_BS = (
            self._share_of(
                self._repeats.count(list_values(rows["sparse"], len(self.schema.single))), mine
            )
            if self._repeats
            else None
        )
        weight_B = torch.zeros(mine.length, device=self.device)
        weight_B[: mine.table.num_rows] = self._workers / mine.total
        teacher_BT = self._teacher(mine)
        for lane in self.lanes:
            lane.learn(batches[lane.uses_history], weight_B, teacher_BT, repeats_BS)

    def evaluate(self, rows: pa.Table) -> Predictions:
        """What the models, as they are, say of this worker's rows of a global batch."""
        mine = worker_slice(rows, self._worker, self._workers)
        batches = self._batches(mine)
        count = mine.table.num_rows
        predicted: dict[str, Tensor] = {}
        for lane in self.lanes:
            predicted |= lane.predict(batches[lane.uses_history])
        sparse_NS = list_values(mine.table["sparse"], len(self.schema.single))
        return Predictions(
            logits={name: logits_BT[:count].cpu().numpy() for name, logits_BT in predicted.items()},
            labels_NT=list_values(mine.table["labels"], len(self.schema.tasks)),
            domain_N=mine.table["domain"].to_numpy(),
            group_N=np.zeros(count, np.int32)
            if self._group_column is None
            else sparse_NS[:, self._group_column],
        )

    def gather(self, mine: Sequence[Predictions]) -> Predictions | None:
        """All workers' parts together on rank 0; None elsewhere, and where the window has no row
        for this group."""
        if self._workers == 1:
            return Predictions.join(mine) if mine else None
        everyone: list[Any] | None = [None] * self._workers if self._worker == 0 else None
        dist.gather_object(mine, everyone)
        parts = [part for worker in everyone or [] for part in worker]
        return Predictions.join(parts) if parts else None

    def _batches(self, mine: WorkerSlice) -> tuple[Batch, Batch]:
        """This worker's examples; and the same with their history among the dense features, where
        they have one."""
        batch = to_batch(mine.table, self.schema)
        remembered = batch
        if HISTORY_COLUMN in mine.table.column_names:
            width = mine.table.schema.field(HISTORY_COLUMN).type.list_size
            history_BF = torch.from_numpy(list_values(mine.table[HISTORY_COLUMN], width).copy())
            remembered = replace(batch, dense_BD=torch.cat([batch.dense_BD, history_BF], dim=1))
        first = pad(batch, mine.length).to(self.device)
        return first, first if remembered is batch else pad(remembered, mine.length).to(self.device)

    def _share_of(self, values_NS: Tensor, mine: WorkerSlice) -> Tensor:
        """This worker's rows of what belongs to a global batch, filled up with zeros."""
        own_BS = values_NS[self._worker * mine.length :][: mine.length]
        return F.pad(own_BS, (0, 0, 0, mine.length - len(own_BS))).to(self.device)

    def _teacher(self, mine: WorkerSlice) -> Tensor | None:
        values = teacher_values(mine.table, self.teacher_tasks)
        if values is None:
            return None
        teacher_BT = torch.from_numpy(values[:, np.array(self.teacher_columns)]).movedim(
            0, -2
        )  # (K, B, T) with several models
        return F.pad(teacher_BT, (0, 0, 0, mine.length - mine.table.num_rows)).to(self.device)


def pad(batch: Batch, length: int) -> Batch:
    """Fill a batch up to `length` rows with rows of missing values, so that all workers step with
    equal lengths."""
    short = length - len(batch)
    if short <= 0:
        return batch
    rows = (0, 0, 0, short)
    return Batch(
        sparse_BS=F.pad(batch.sparse_BS, rows),
        bag_values_V=batch.bag_values_V,
        bag_lengths_MB=F.pad(batch.bag_lengths_MB, (0, short)),
        dense_BD=F.pad(batch.dense_BD, rows),
        labels_BT=F.pad(batch.labels_BT, rows),
    )
