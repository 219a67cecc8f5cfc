"""Trainers that see the same batches: those of one domain, or the FM over all domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import Tensor

from exfm_ray.data.stream import list_values
from exfm_ray.schema import Schema
from exfm_ray.training.model_trainer import ModelTrainer
from exfm_ray.training.row_usage import RowLastUse
from exfm_ray.training.table_sharing import TableSharing
from exfm_ray.training.train_batch import BatchParser, model_inputs


@dataclass
class Predictions:
    """Rows of a window, in order, with the predictions of each model of a group.

    Attributes:
        logits: name of the model -> float32 (N, tasks of the model).
        labels_NT: float32, all tasks of the stream.
        domain_N: int32, the domain.
        group_N: int32, the id by which AUC is grouped; 0 if the schema groups by nothing.
    """

    logits: dict[str, np.ndarray]
    labels_NT: np.ndarray
    domain_N: np.ndarray
    group_N: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Concatenate the rows of all parts."""
        logits = {
            name: np.concatenate([part.logits[name] for part in parts]) for name in parts[0].logits
        }
        return cls(
            logits=logits,
            labels_NT=np.concatenate([part.labels_NT for part in parts]),
            domain_N=np.concatenate([part.domain_N for part in parts]),
            group_N=np.concatenate([part.group_N for part in parts]),
        )


@dataclass
class BatchGroup:
    """Trainers that see the same rows: those of one domain, or all rows (`domain` None).

    Attributes:
        teacher_columns: which of the `teacher_tasks` prediction columns belong to the trainers'
            tasks, in their order. One sequence for each model if a trainer stacks several.
        evict_after_windows: after how many windows without use a row is reset; None: never.
        sharing: where the arms with +share read the teacher's table rows.
    """

    schema: Schema
    trainers: Sequence[ModelTrainer]
    domain: int | None
    batch_size: int
    device: torch.device
    teacher_columns: Sequence[int] | Sequence[Sequence[int]] = ()
    teacher_tasks: int = 0
    evict_after_windows: int | None = None
    sharing: TableSharing | None = None
    _usage: RowLastUse | None = field(init=False)

    def __post_init__(self) -> None:
        self._usage = None
        if self.evict_after_windows:
            self._usage = RowLastUse(self.schema, self.evict_after_windows)
        names = [f.name for f in self.schema.single]
        self._group_column = names.index(self.schema.group_by) if self.schema.group_by else None
        self._worker = dist.get_rank()
        self._workers = dist.get_world_size()
        self._parser = BatchParser(
            self.schema,
            self.device,
            self.teacher_columns,
            self.teacher_tasks,
            counts_rows=any(trainer.engine.decays for trainer in self.trainers),
        )

    def select(self, table: pa.Table) -> pa.Table:
        """The group's rows of a fragment."""
        if self.domain is None:
            return table
        return table.filter(pc.equal(table["domain"], self.domain))

    def begin_window(self, window: int) -> None:
        """Prepare the evaluation of a window: write the rows of its ids into arms with +share."""
        trainers = self._sharing_trainers()
        if self.sharing and trainers:
            rows = self.sharing.rows(window)
            for trainer in trainers:
                trainer.engine.write_rows(rows, self.sharing.weight)

    def refresh(self, windows: int) -> None:
        """Write all of the teacher's rows known after `windows` windows into arms with +share.

        The models are then exported with them.
        """
        trainers = self._sharing_trainers()
        if self.sharing and trainers:
            for rows in self.sharing.rows_after(windows):
                for trainer in trainers:
                    trainer.engine.write_rows(rows, self.sharing.weight)

    def mark(self, rows: pa.Table) -> None:
        """Note that these rows of a fragment are going to be learned."""
        if self.sharing:
            self.sharing.mark(rows)
        if self._usage:
            self._usage.mark(rows)

    def end_window(self) -> None:
        """Finish a window that was learned: reset table rows that are out of use for too long."""
        if self.sharing:
            self.sharing.end_window()
        if self._usage:
            stale = self._usage.end_window()
            for trainer in self.trainers:
                trainer.engine.reset_rows(stale)

    @property
    def usage(self) -> RowLastUse | None:
        """When rows were last used, equal on all workers; None if unused rows are not reset."""
        return self._usage

    def learn(self, rows: pa.Table) -> None:
        """Take one step of every trainer on a global batch."""
        batch = self._parser.train_batch(rows)
        for trainer in self.trainers:
            trainer.learn(batch)

    def evaluate(self, rows: pa.Table) -> Predictions:
        """Predictions of the current models for this worker's rows of a global batch."""
        local = self._parser.local_slice(rows)
        features, history_BF = self._parser.features(local)
        predicted: dict[str, Tensor] = {}
        for trainer in self.trainers:
            inputs = model_inputs(features, history_BF, trainer.uses_history)
            predicted |= trainer.predict(inputs)

        count = local.table.num_rows  # the rows after it are padding
        return Predictions(
            logits={name: logits_BT[:count].cpu().numpy() for name, logits_BT in predicted.items()},
            labels_NT=list_values(local.table["labels"], len(self.schema.tasks)),
            domain_N=local.table["domain"].to_numpy(),
            group_N=self._group_ids(local.table),
        )

    def gather(self, local_parts: Sequence[Predictions]) -> Predictions | None:
        """Join all workers' predictions on rank 0.

        Returns:
            None on the other ranks, and if the window has no row for this group.
        """
        parts = list(local_parts)
        if self._workers > 1:
            parts = self._gather_parts(local_parts)
        return Predictions.join(parts) if parts else None

    def _gather_parts(self, local_parts: Sequence[Predictions]) -> list[Predictions]:
        """The parts of all workers in the order of ranks; empty on the other ranks."""
        gathered: list[Any] | None = None
        if self._worker == 0:
            gathered = [None] * self._workers
        dist.gather_object(local_parts, gathered)
        parts: list[Predictions] = []
        for worker_parts in gathered or []:
            parts += worker_parts
        return parts

    def _sharing_trainers(self) -> list[ModelTrainer]:
        """Trainers of arms with +share."""
        return [trainer for trainer in self.trainers if trainer.arm and trainer.arm.shares_tables]

    def _group_ids(self, table: pa.Table) -> np.ndarray:
        """The id by which AUC is grouped, for each row."""
        if self._group_column is None:
            return np.zeros(table.num_rows, np.int32)
        sparse_NS = list_values(table["sparse"], len(self.schema.single))
        return sparse_NS[:, self._group_column]
