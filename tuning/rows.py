"""A student's rows with their supervision, read once and shared by all its trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from exfm_ray.config.arms import Arm
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.data.labels.corrections import without_corrections
from exfm_ray.data.readers import WindowPass
from exfm_ray.data.stream import EventStream, Fragment
from exfm_ray.stores.supervision import TEACHER_COLUMN
from exfm_ray.training.job import Job


@dataclass(frozen=True)
class StudentRows:
    """Reads like `AugmentedReader`, from memory: in Ray's object store its tables are read in place
    by every trial.

    Attributes:
        listed: window -> its fragments that hold rows of the student.
        tables: (window, fragment's file) -> packed rows, with the teacher's predictions where there
            are any.
        judged: those that are evaluated instead, where corrections stand among the rows.
    """

    listed: Mapping[int, tuple[Fragment, ...]]
    tables: Mapping[tuple[int, str], pa.Table]
    judged: Mapping[tuple[int, str], pa.Table] = field(default_factory=dict)

    @classmethod
    def read_from(
        cls,
        config: Config,
        student: StudentConfig,
        windows: Sequence[int],
    ) -> StudentRows:
        """Read them from the run's folder."""
        arms = (Arm("labels"), Arm("kd"), *(arm for arm in config.arms if arm.uses_history))
        distilled = config.model_copy(update={"vm": config.vm.model_copy(update={"arms": arms})})
        job = Job("tune", distilled, (student,))
        reader = job.reader(EventStream.open(job.stream_root).schema)
        listed = {
            window: tuple(reader.fragments(WindowPass(window, "learn"))) for window in windows
        }
        tables = {
            (window, f.file): reader.read(WindowPass(window, "learn"), f)
            for window, fragments in listed.items()
            for f in fragments
        }
        own = {key: without_corrections(table) for key, table in tables.items()}
        return cls(
            listed,
            tables,
            {key: table for key, table in own.items() if table.num_rows < tables[key].num_rows},
        )

    def ready(self, work: WindowPass) -> bool:
        return work.window in self.listed

    def missing_input(self, work: WindowPass) -> str:
        return f"window {work.window}, which was not put into memory"

    def fragments(self, work: WindowPass) -> Sequence[Fragment]:
        return self.listed[work.window]

    def read(self, work: WindowPass, fragment: Fragment) -> pa.Table:
        key = work.window, fragment.file
        if work.purpose == "learn":
            return self.tables[key]
        table = self.judged.get(key, self.tables[key])
        return (
            table.drop_columns([TEACHER_COLUMN]) if TEACHER_COLUMN in table.column_names else table
        )
