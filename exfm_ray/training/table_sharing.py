"""What arms with +share are given: the teacher's table rows for a window's ids, made to fit the
vertical model's tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

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


def widths(
    config: Config,
    student: StudentConfig | None,
    schema: Schema,
) -> dict[str, int]:
    """Width of each table's rows in a student, or in the FM (None)."""
    model = config.fm.model if student is None else student.model or config.vm.model
    embeddings = Layout.from_config(model, schema).embeddings
    return {table: number * model.dim for table, number in embeddings.items()}


def teachers_widths(
    config: Config,
    teacher: str | None,
    schema: Schema,
) -> dict[str, int] | None:
    """Width of each table's rows in a teacher: the FM, a vertical model of this run, or another
    run's FM, by its first snapshot; None where that one has published none yet."""
    if teacher in (None, config.fm.name):
        return widths(config, None, schema)
    if any(other.name == teacher and other.run for other in config.teachers):
        snapshots = SnapshotStore.from_config(config, teacher)
        first = snapshots.versions()[:1]
        stored = snapshots.manifest(first[0], schema) if first else None
        return (
            {
                name: number * stored.network.dim
                for name, number in Layout.from_config(stored.network, schema).embeddings.items()
            }
            if stored
            else None
        )
    return widths(
        config, next(student for student in config.vm.models if student.name == teacher), schema
    )


def check_sharing(config: Config, schema: Schema) -> None:
    """UserError where the config's arms share tables that are not there, or rows that do not fit
    and have no projection."""
    share = config.distillation.share
    if not any(arm.shares_tables for arm in config.arms):
        return
    searched = (
        config.tune.space["distillation.share.tables"].choice
        if config.tune and "distillation.share.tables" in config.tune.space
        else ()
    )
    for setting, names in (
        ("distillation.share.tables", share.tables),
        *(("tune.space", choice) for choice in searched),
    ):
        for name in names if isinstance(names, tuple) else ():
            if name not in schema.tables:
                told = (
                    nearest(str(name), schema.tables) or f" There are {', '.join(schema.tables)}."
                )
                raise UserError(f"setting '{setting}': no table is named '{name}'.{told}")
    for student in config.vm.models:
        theirs = teachers_widths(config, student.teacher, schema)
        for name, width in widths(config, student, schema).items() if theirs else ():
            if (
                (name in share.tables or not share.tables)
                and theirs
                and width != theirs[name]
                and share.projection == "none"
            ):
                raise misfit(student, name, theirs[name], width)


def misfit(
    student: StudentConfig,
    table: str,
    given: int,
    width: int,
) -> UserError:
    """That rows of `given` numbers cannot be written into a table of `width`."""
    teacher = f"teacher '{student.teacher}'" if student.teacher else "the FM"
    return UserError(
        f"setting 'vm.arms': '{student.name}' shares table '{table}', whose rows have {given} numbers in {teacher} and {width} in the student; set "
        "distillation.share.projection=principal, give both the same dim and embeddings, or leave the table out of distillation.share.tables"
    )


@dataclass
class TableSharing:
    """The rows for one student, window by window.

    Attributes:
        widths: of the student's tables.
        uses: how often each row was used, where that decides.
    """

    config: Config
    store: SharedStore
    schema: Schema
    student: StudentConfig
    widths: Mapping[str, int]
    uses: RowUseCounts | None = field(init=False)

    def __post_init__(self) -> None:
        self._share = self.config.distillation.share
        self.uses = RowUseCounts(self.schema) if self._share.mode == "unseen" else None

    @classmethod
    def from_config(
        cls,
        config: Config,
        student: StudentConfig,
        schema: Schema,
    ) -> TableSharing | None:
        """None where no arm takes rows."""
        store = shared_store(config, student.teacher)
        return (
            cls(config, store, schema, student, widths(config, student, schema)) if store else None
        )

    @property
    def weight(self) -> float:
        """How far a row is moved to the given one."""
        return self._share.weight if self._share.mode == "average" else 1.0

    def rows(self, window: int) -> dict[str, RowUpdate]:
        """What is written before a window is evaluated; nothing in windows without a teacher."""
        policy = SnapshotPolicy.from_config(self.config.das)
        if policy.version(window) is None:
            return {}
        given = self.store.read(window, self.student.domain, self.schema, policy)
        return {name: self._fit(name, rows) for name, rows in given.items() if self._takes(name)}

    def rows_after(self, windows: int) -> Iterator[dict[str, RowUpdate]]:
        """What a student is served with after so many windows: all rows of the snapshot that is to
        supervise the next one, in parts."""
        version = SnapshotPolicy.from_config(self.config.das).version(windows)
        if version is None:
            return
        snapshots = SnapshotStore.from_config(self.config, self.store.teacher)
        for name, first_row, row_XW in snapshots.tables(version, self.schema):
            if self._takes(name):
                id_X = np.arange(first_row, first_row + len(row_XW))
                yield {name: self._fit(name, TableRows(id_X, row_XW, torch.zeros(len(row_XW))))}

    def mark(self, rows: pa.Table) -> None:
        """These rows, of a fragment, are going to be learnt."""
        if self.uses:
            self.uses.mark(rows)

    def end_window(self) -> None:
        """The window is learnt."""
        if self.uses:
            self.uses.end_window()

    def _takes(self, table: str) -> bool:
        """The DAS may give rows of more tables than a sweep's trial takes."""
        return table in self._share.tables or not self._share.tables

    def _fit(self, name: str, rows: TableRows) -> RowUpdate:
        """The student's rows from the teacher's."""
        id_X, row_XW, momentum_X = rows
        if self.uses:
            few_X = self.uses.of(name)[id_X] < self._share.min_uses
            chosen = torch.from_numpy(few_X)
            id_X = id_X[few_X]
            row_XW = row_XW[chosen]
            momentum_X = None if momentum_X is None else momentum_X[chosen]
        given = row_XW.shape[1]
        width = self.widths[name]
        if given != width:
            if (
                self._share.projection == "none"
            ):  # another run's teacher, whose snapshots came after `check_sharing`
                raise misfit(self.student, name, given, width)
            row_XW = row_XW @ self._maps[name]
        if self._share.optimizer == "keep":
            return RowUpdate(id_X, row_XW, None)
        if self._share.optimizer == "reset":
            return RowUpdate(id_X, row_XW, torch.zeros(len(id_X)))
        if momentum_X is None:
            raise UserError(
                f"{self.store.root}: the teacher's rows come without optimizer state, which distillation.share.optimizer=teacher needs; train the FM "
                "anew in a run whose arms share tables, or choose keep or reset"
            )
        return RowUpdate(id_X, row_XW, momentum_X)

    @cached_property
    def _maps(self) -> dict[str, Tensor]:
        """(W of the teacher, W of the student) for each table of another width, from the first rows
        that were given."""
        policy = SnapshotPolicy.from_config(self.config.das)
        window = policy.first
        domain = self.student.domain
        while self.store.has(window) and not self.store.manifest(window).domains[domain].rows:
            window += 1
        first = self.store.read(window, domain, self.schema, policy)
        theirs = self.store.manifest(window).widths
        none = torch.empty(0)
        return {
            name: principal_map(
                first[name].row_XW if name in first else none.view(0, width), self.widths[name]
            )
            for name, width in theirs.items()
            if width != self.widths[name]
        }


def principal_map(row_XW: Tensor, width: int) -> Tensor:
    """The linear map of rows onto the `width` directions in which they are largest (eigenvectors of
    their second moment), float32 (W, width).

    Orthonormal, so it keeps lengths and angles as well as any map to that width can; to a greater
    width the rows are filled up with zeros. The sign of each direction is such that its largest
    component is positive.
    """
    wide = row_XW.shape[1]
    if width >= wide:
        return torch.eye(wide, width)
    _, vector_WW = torch.linalg.eigh(row_XW.double().T @ row_XW.double())
    map_WV = vector_WW.flip(1)[:, :width]
    sign_V = map_WV.gather(0, map_WV.abs().argmax(0, keepdim=True)).sign()
    projection_WV: Tensor = (map_WV * sign_V).float()
    return projection_WV
