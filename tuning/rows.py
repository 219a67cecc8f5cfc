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

FragmentKey = tuple[int, str]
"""A window and the file of one of its fragments."""


@dataclass(frozen=True)
class StudentRows:
    """Reads like `AugmentedReader`, but from memory.

    In Ray's object store, all trials of a node read the same copy of the tables.

    Attributes:
        listed: window -> its fragments that hold rows of the student.
        tables: the rows to learn, with the teacher's predictions where it has made some.
        judged: the rows to evaluate, of the fragments where they differ because of corrections.
    """

    listed: Mapping[int, tuple[Fragment, ...]]
    tables: Mapping[FragmentKey, pa.Table]
    judged: Mapping[FragmentKey, pa.Table] = field(default_factory=dict)

    @classmethod
    def read_from(
        cls,
        config: Config,
        student: StudentConfig,
        windows: Sequence[int],
    ) -> StudentRows:
        """Read the student's rows of `windows` from the run's folder."""
        history_arms = [arm for arm in config.arms if arm.uses_history]
        arms = (Arm("labels"), Arm("kd"), *history_arms)
        with_supervision = config.vm.model_copy(update={"arms": arms})
        job = Job("tune", config.model_copy(update={"vm": with_supervision}), (student,))
        reader = job.reader(EventStream.open(job.stream_root).schema)

        listed: dict[int, tuple[Fragment, ...]] = {}
        tables: dict[FragmentKey, pa.Table] = {}
        judged: dict[FragmentKey, pa.Table] = {}
        for window in windows:
            window_pass = WindowPass(window, "learn")
            listed[window] = tuple(reader.fragments(window_pass))
            for fragment in listed[window]:
                table = reader.read(window_pass, fragment)
                original = without_corrections(table)
                tables[window, fragment.file] = table
                if original.num_rows < table.num_rows:
                    judged[window, fragment.file] = original
        return cls(listed, tables, judged)

    def ready(self, window_pass: WindowPass) -> bool:
        return window_pass.window in self.listed

    def missing_input(self, window_pass: WindowPass) -> str:
        return f"window {window_pass.window}, which was not read into memory"

    def fragments(self, window_pass: WindowPass) -> Sequence[Fragment]:
        return self.listed[window_pass.window]

    def read(self, window_pass: WindowPass, fragment: Fragment) -> pa.Table:
        key = window_pass.window, fragment.file
        if window_pass.purpose == "learn":
            return self.tables[key]
        table = self.judged.get(key, self.tables[key])
        if TEACHER_COLUMN not in table.column_names:
            return table
        return table.drop_columns([TEACHER_COLUMN])
