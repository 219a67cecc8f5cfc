"""The teacher's table rows for the ids of a window, fitted to the tables of a vertical model.

Arms with +share write them into their tables. Shape suffixes: X rows, W and V widths of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from exfm_ray.config.models import ModelConfig
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.engine.tensor_store import RowUpdate
from exfm_ray.errors import UserError, nearest
from exfm_ray.models.layout import Layout
from exfm_ray.schema import Schema
from exfm_ray.stores.shared_rows import SharedStore, TableRows, shared_store
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.snapshots import SnapshotStore
from exfm_ray.training.row_usage import RowUseCounts


def network_widths(network: ModelConfig, schema: Schema) -> dict[str, int]:
    """Width of each table's rows in a network."""
    embeddings = Layout.from_config(network, schema).embeddings
    return {table: count * network.dim for table, count in embeddings.items()}


def widths(
    config: Config,
    student: StudentConfig | None,
    schema: Schema,
) -> dict[str, int]:
    """Width of each table's rows in a student, or in the FM (None)."""
    network = config.fm.model if student is None else student.model or config.vm.model
    return network_widths(network, schema)


def teachers_widths(
    config: Config,
    teacher: str | None,
    schema: Schema,
) -> dict[str, int] | None:
    """Width of each table's rows in a teacher.

    The teacher is the FM, a vertical model of this run, or the FM of another run, which is known by
    its first snapshot.

    Returns:
        None if another run's FM has not published a snapshot yet.
    """
    if teacher in (None, config.fm.name):
        return widths(config, None, schema)
    if any(other.name == teacher and other.run for other in config.teachers):
        snapshots = SnapshotStore.from_config(config, teacher)
        versions = snapshots.versions()
        if not versions:
            return None
        return network_widths(snapshots.manifest(versions[0], schema).network, schema)
    student = next(student for student in config.vm.models if student.name == teacher)
    return widths(config, student, schema)


def check_sharing(config: Config, schema: Schema) -> None:
    """Check the tables that the config's arms share.

    Raises:
        UserError: a table does not exist, or its rows do not fit the student's table and are not
            projected.
    """
    if not any(arm.shares_tables for arm in config.arms):
        return
    setting = "distillation.share.tables"
    _check_tables_exist(setting, config.distillation.share.tables, schema)
    if config.tune and setting in config.tune.space:
        for choice in config.tune.space[setting].choice:
            if isinstance(choice, tuple):
                _check_tables_exist("tune.space", choice, schema)
    for student in config.vm.models:
        _check_widths(config, student, schema)


def _check_tables_exist(
    setting: str,
    names: tuple[object, ...],
    schema: Schema,
) -> None:
    for name in names:
        if name not in schema.tables:
            known = f" There are {', '.join(schema.tables)}."
            hint = nearest(str(name), schema.tables) or known
            raise UserError(f"setting '{setting}': no table is named '{name}'.{hint}")


def _check_widths(
    config: Config,
    student: StudentConfig,
    schema: Schema,
) -> None:
    """UserError if the teacher's rows of a shared table do not fit and are not projected."""
    share = config.distillation.share
    teacher_widths = teachers_widths(config, student.teacher, schema)
    if not teacher_widths or share.projection != "none":
        return
    for name, width in widths(config, student, schema).items():
        is_shared = name in share.tables or not share.tables
        if is_shared and width != teacher_widths[name]:
            raise misfit(student, name, teacher_widths[name], width)


def misfit(
    student: StudentConfig,
    table: str,
    teacher_width: int,
    width: int,
) -> UserError:
    """The error of rows of `teacher_width` numbers that a table of `width` cannot take."""
    teacher = f"teacher '{student.teacher}'" if student.teacher else "the FM"
    return UserError(
        f"setting 'vm.arms': '{student.name}' shares table '{table}', whose rows have "
        f"{teacher_width} numbers in {teacher} and {width} in the student; set "
        "distillation.share.projection=principal, give both the same dim and embeddings, "
        "or leave the table out of distillation.share.tables"
    )


@dataclass
class TableSharing:
    """The teacher's rows for one student, window by window.

    Attributes:
        widths: of the rows of the student's tables.
        uses: how often each row was used, if only rows of rare ids are written.
    """

    config: Config
    store: SharedStore
    schema: Schema
    student: StudentConfig
    widths: Mapping[str, int]
    uses: RowUseCounts | None = field(init=False)

    def __post_init__(self) -> None:
        self._settings = self.config.distillation.share
        self._policy = SnapshotPolicy.from_config(self.config.das)
        self.uses = RowUseCounts(self.schema) if self._settings.mode == "unseen" else None

    @classmethod
    def from_config(
        cls,
        config: Config,
        student: StudentConfig,
        schema: Schema,
    ) -> TableSharing | None:
        """The sharing of a student; None if no arm shares tables."""
        store = shared_store(config, student.teacher)
        if store is None:
            return None
        return cls(config, store, schema, student, widths(config, student, schema))

    @property
    def weight(self) -> float:
        """How far a row is moved towards the teacher's."""
        return self._settings.weight if self._settings.mode == "average" else 1.0

    def rows(self, window: int) -> dict[str, RowUpdate]:
        """The rows to write before a window is evaluated; none for windows without a teacher."""
        if self._policy.version(window) is None:
            return {}
        teacher_rows = self.store.read(window, self.student.domain, self.schema, self._policy)
        return {
            name: self._fit(name, rows)
            for name, rows in teacher_rows.items()
            if self._is_shared(name)
        }

    def rows_after(self, windows: int) -> Iterator[dict[str, RowUpdate]]:
        """The rows to export a student with after so many windows.

        They are all rows, in parts, of the snapshot that will supervise the next window.
        """
        version = self._policy.version(windows)
        if version is None:
            return
        snapshots = SnapshotStore.from_config(self.config, self.store.teacher)
        for name, first_row, row_XW in snapshots.tables(version, self.schema):
            if self._is_shared(name):
                count = len(row_XW)
                id_X = np.arange(first_row, first_row + count)
                rows = TableRows(id_X, row_XW, torch.zeros(count))
                yield {name: self._fit(name, rows)}

    def mark(self, rows: pa.Table) -> None:
        """Note that these rows of a fragment are going to be learned."""
        if self.uses:
            self.uses.mark(rows)

    def end_window(self) -> None:
        """Note that the window is learned."""
        if self.uses:
            self.uses.end_window()

    def _is_shared(self, table: str) -> bool:
        """The DAS may publish rows of more tables than a trial of a sweep shares."""
        return table in self._settings.tables or not self._settings.tables

    def _fit(self, name: str, rows: TableRows) -> RowUpdate:
        """The student's rows for the teacher's rows of a table."""
        if self.uses:
            rows = self._rarely_used(self.uses, name, rows)
        row_XW = rows.row_XW
        teacher_width = row_XW.shape[1]
        width = self.widths[name]
        if teacher_width != width:
            # `check_sharing` did not see another run's teacher that had no snapshot yet.
            if self._settings.projection == "none":
                raise misfit(self.student, name, teacher_width, width)
            row_XW = row_XW @ self._projections[name]
        return RowUpdate(rows.id_X, row_XW, self._momentum(rows))

    def _rarely_used(
        self,
        uses: RowUseCounts,
        name: str,
        rows: TableRows,
    ) -> TableRows:
        """The rows that the student has used less than `min_uses` times."""
        is_rare_X = uses.of(name)[rows.id_X] < self._settings.min_uses
        mask_X = torch.from_numpy(is_rare_X)
        momentum_X = None if rows.momentum_X is None else rows.momentum_X[mask_X]
        return TableRows(rows.id_X[is_rare_X], rows.row_XW[mask_X], momentum_X)

    def _momentum(self, rows: TableRows) -> Tensor | None:
        """The optimizer state to write with the rows; None keeps the student's."""
        if self._settings.optimizer == "keep":
            return None
        if self._settings.optimizer == "reset":
            return torch.zeros(len(rows.id_X))
        if rows.momentum_X is None:
            raise UserError(
                f"{self.store.root}: the teacher's rows come without optimizer state, which "
                "distillation.share.optimizer=teacher needs; train the FM again in a run whose "
                "arms share tables, or choose keep or reset"
            )
        return rows.momentum_X

    @cached_property
    def _projections(self) -> dict[str, Tensor]:
        """(W of the teacher, W of the student) for each table of another width.

        They depend on the rows of the first window that has any.
        """
        domain = self.student.domain
        window = self._policy.first
        while self.store.has(window) and not self.store.manifest(window).domains[domain].rows:
            window += 1
        first_rows = self.store.read(window, domain, self.schema, self._policy)

        projections = {}
        for name, teacher_width in self.store.manifest(window).widths.items():
            width = self.widths[name]
            if teacher_width == width:
                continue
            row_XW = torch.empty(0, teacher_width)
            if name in first_rows:
                row_XW = first_rows[name].row_XW
            projections[name] = principal_map(row_XW, width)
        return projections


def principal_map(row_XW: Tensor, width: int) -> Tensor:
    """The linear map onto the `width` directions in which the rows are largest.

    The directions are the eigenvectors of the rows' second moment. They are orthonormal, so the map
    keeps lengths and angles as well as any map to that width can. Rows are padded with zeros to a
    greater width. The largest component of each direction is positive.

    Returns:
        float32 (W, width).
    """
    teacher_width = row_XW.shape[1]
    if width >= teacher_width:
        return torch.eye(teacher_width, width)
    double_XW = row_XW.double()
    moment_WW = double_XW.T @ double_XW
    _, vector_WW = torch.linalg.eigh(moment_WW)
    map_WV = vector_WW.flip(1)[:, :width]
    largest_V = map_WV.abs().argmax(0, keepdim=True)
    sign_V = map_WV.gather(0, largest_V).sign()
    projection_WV: Tensor = (map_WV * sign_V).float()
    return projection_WV
