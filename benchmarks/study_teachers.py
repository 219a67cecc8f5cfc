"""Teachers of the study, each trained once a seed without Ray's feeds and files, and the students'
rows with all their predictions.

A teacher that has learnt windows < t is asked about windows t + lag - 1: it is then the version
that rule 2 names for them. The base FM answers for lags 1, 2, 4 and 8, all others for lag 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from exfm_ray.config.checks import with_settings
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.data.readers import FragmentReader, WindowPass
from exfm_ray.data.stream import EventStream, Fragment, list_values, window_name
from exfm_ray.metrics.state import MetricState
from exfm_ray.stores.readers import AugmentedReader
from exfm_ray.stores.snapshot_policy import SnapshotPolicy, newest_allowed_version
from exfm_ray.stores.supervision import TEACHER_COLUMN
from exfm_ray.training.group import Predictions
from exfm_ray.training.job import Job
from exfm_ray.training.local import LocalClient, local_loop
from exfm_ray.training.loop import Loop
from tuning.rows import StudentRows

FM = "fm"
SIZES = {
    "small": {"type": "wukong", "l": 1, "n_F": 4, "n_L": 4, "k": 4, "fmb_mlp": [32], "mlp": [32]},
    "large": {
        "type": "wukong",
        "l": 4,
        "n_F": 16,
        "n_L": 16,
        "k": 12,
        "fmb_mlp": [256],
        "mlp": [256],
    },
}
CONTROL_TEACHERS = ("shuffled", "constant", "own_label")
CEILING = 1 - 1e-7

WindowPredictions = dict[int, np.ndarray]
"""Window -> float32 probabilities of the student's rows in it, in the stream's order; no window
without supervision."""
Column = tuple[int, str]
"""Seed and name of a teacher: what one column of predictions holds."""


class Teacher(NamedTuple):
    """A model that teaches `students`, trained on all domains, or on `domain` alone."""

    name: str
    settings: dict[str, object]
    students: tuple[StudentConfig, ...]
    lags: tuple[int, ...] = (1,)
    domain: str | None = None

    def column(self, lag: int) -> str:
        """Name of what it says at this lag."""
        return f"lag {lag}" if self.name == FM else self.name


def teachers(config: Config, lags: tuple[int, ...]) -> list[Teacher]:
    """The base FM, FMs of other sizes, the students' own networks trained on all domains as the
    students are, FMs of one domain."""
    students = config.vm.models
    found = [Teacher(FM, {}, students, lags)]
    found += [
        Teacher(size, {"fm.model": {**model, "dim": config.fm.model.dim}}, students)
        for size, model in SIZES.items()
    ]
    as_student = {
        "fm.batch_size": config.vm.batch_size,
        "fm.optimizer": config.vm.optimizer.model_dump(mode="json"),
    }
    networks = [student.model or config.vm.model for student in students]
    for network in (
        network for number, network in enumerate(networks) if network not in networks[:number]
    ):
        alike = tuple(
            student for student, own in zip(students, networks, strict=True) if own == network
        )
        found.append(
            Teacher(
                "student_sized", {"fm.model": network.model_dump(mode="json"), **as_student}, alike
            )
        )
    for domain in dict.fromkeys(student.domain for student in students):
        found.append(
            Teacher(
                "one_domain", {}, tuple(s for s in students if s.domain == domain), domain=domain
            )
        )
    return found


def teach(
    config: Config,
    teacher: Teacher,
    seed: int,
    windows: int,
) -> dict[tuple[str, str], WindowPredictions]:
    """Train one teacher over windows 0 to `windows` - 1; (student, column) -> what it says. No
    prediction knows its own window."""
    torch.set_num_threads(1)
    job = Job("fm", with_settings(config, {**teacher.settings, "seed": seed}))
    schema = EventStream.open(job.stream_root).schema
    learnt = (
        range(len(schema.domains))
        if teacher.domain is None
        else (schema.domain_index(teacher.domain),)
    )
    asked = sorted({schema.domain_index(student.domain) for student in teacher.students})
    every, own = (
        AugmentedReader(job.stream_root, None, SnapshotPolicy(1), tuple(domains), ())
        for domains in (learnt, asked)
    )
    loop, _ = local_loop(job, range(windows), every)
    (lane,) = loop.groups[0].lanes
    said: dict[tuple[str, str], WindowPredictions] = {
        (s.name, teacher.column(lag)): {} for s in teacher.students for lag in teacher.lags
    }
    for version in range(windows):
        for lag in teacher.lags if version else ():
            window = version + lag - 1
            assert newest_allowed_version(window, lag) == version, "rule 2"
            evaluated = _evaluate(loop, own, window) if window < windows else None
            if evaluated is None:  # behind the end, or none of the students has a row in it
                continue
            for student in teacher.students:
                task = lane.tasks.index(schema.task_index(student.tasks[0]))
                domain = schema.domain_index(student.domain)
                logits_N = evaluated.logits[lane.name][:, task][evaluated.domain_N == domain]
                said[student.name, teacher.column(lag)][window] = (
                    torch.from_numpy(logits_N).sigmoid().numpy()
                )
        if version < windows - 1:
            work = WindowPass(version, "learn")
            _ready(loop, every, work)
            loop.run_passes([work], version)
    return said


def _evaluate(
    loop: Loop,
    reader: FragmentReader,
    window: int,
) -> Predictions | None:
    """What the model, as it is, says of the reader's rows of a window."""
    work = WindowPass(window, "evaluate")
    _ready(loop, reader, work)
    return loop._evaluate(work)[0]


def _ready(
    loop: Loop,
    reader: FragmentReader,
    work: WindowPass,
) -> None:
    """Make the loop read this pass next, from `reader`."""
    client: Any = LocalClient(reader, [work])
    loop.reader = reader
    loop.client = client


def controls(
    labels: Mapping[int, np.ndarray],
    said: WindowPredictions,
    seed: int,
) -> dict[str, WindowPredictions]:
    """Teachers that know nothing, from the student's labels (window -> float32 of its rows) and
    what the base FM says at lag 1.

    `shuffled`: the FM's predictions, permuted within the window. `constant`: the mean label of the
    windows before. `own_label`: the example's own label.
    """
    found: dict[str, WindowPredictions] = {name: {} for name in CONTROL_TEACHERS}
    for window in said:
        earlier_N = np.concatenate([y_N for w, y_N in labels.items() if w < window])
        found["shuffled"][window] = np.random.default_rng((seed, window)).permutation(said[window])
        found["constant"][window] = np.full(
            len(labels[window]), earlier_N.mean() if len(earlier_N) else np.nan, np.float32
        )
        found["own_label"][window] = labels[window]
    return found


def student_rows(
    config: Config,
    student: StudentConfig,
    windows: int,
    taught: Mapping[int, Mapping[str, WindowPredictions]],
) -> tuple[StudentRows, list[Column]]:
    """The student's rows, a table a window, with a column for each seed and teacher (NaN where it
    does not supervise).

    Args:
        taught: seed -> teacher -> predictions; every seed has the same teachers, "lag 1" among
            them.
    """
    stream = EventStream.open(config.folder / "stream")
    reader = AugmentedReader(
        stream.root, None, SnapshotPolicy(1), (stream.schema.domain_index(student.domain),), ()
    )
    read = {
        w: [
            reader.read(WindowPass(w, "learn"), f) for f in reader.fragments(WindowPass(w, "learn"))
        ]
        for w in range(windows)
    }
    tables = {w: pa.concat_tables(parts).combine_chunks() for w, parts in read.items() if parts}
    task = stream.schema.task_index(student.tasks[0])
    tasks = len(stream.schema.tasks)
    labels = {w: list_values(table["labels"], tasks)[:, task] for w, table in tables.items()}
    said = {
        (seed, name): p
        for seed, by in taught.items()
        for name, p in {**by, **controls(labels, by["lag 1"], seed)}.items()
    }
    columns = list(said)
    listed: dict[int, tuple[Fragment, ...]] = {}
    packed = {}
    for window in range(windows):
        if window not in tables:
            listed[window] = ()
            continue
        table = tables[window]
        missing_N = np.full(table.num_rows, np.nan, np.float32)
        p_NC = np.stack([said[column].get(window, missing_N) for column in columns], axis=1)
        packed[window, window_name(window)] = table.append_column(
            TEACHER_COLUMN, pa.FixedSizeListArray.from_arrays(p_NC.ravel(), len(columns))
        )
        listed[window] = (
            Fragment(
                file=window_name(window), rows=table.num_rows, bytes=table.nbytes, domain_rows=()
            ),
        )
    return StudentRows(listed, packed), columns


def supervised(
    rows: StudentRows,
    chosen: Sequence[int],
    first: int,
) -> StudentRows:
    """The same rows with the `chosen` columns of predictions only, in this order; without
    supervision in windows before `first`."""
    tables = {}
    for key, table in rows.tables.items():
        plain = table.drop_columns([TEACHER_COLUMN])
        if chosen and key[0] >= first:
            p_NC = list_values(
                table[TEACHER_COLUMN], table.schema.field(TEACHER_COLUMN).type.list_size
            )[:, chosen]
            assert not np.isnan(p_NC).any(), (
                "a teacher of these columns supervises no earlier than it can"
            )
            plain = plain.append_column(
                TEACHER_COLUMN, pa.FixedSizeListArray.from_arrays(p_NC.ravel(), len(chosen))
            )
        tables[key] = plain
    return StudentRows(rows.listed, tables)


def teacher_nes(
    config: Config,
    student: StudentConfig,
    rows: StudentRows,
    columns: Sequence[Column],
    windows: range,
) -> dict[Column, float]:
    """NE of each teacher on the student's rows of `windows`, of those that supervise all of
    them."""
    schema = EventStream.open(config.folder / "stream").schema
    tables = [table for (window, _), table in sorted(rows.tables.items()) if window in windows]
    y_N = np.concatenate([list_values(t["labels"], len(schema.tasks)) for t in tables])[
        :, schema.task_index(student.tasks[0])
    ]
    p_NC = (
        np.concatenate([list_values(t[TEACHER_COLUMN], len(columns)) for t in tables])
        .astype(np.float64)
        .clip(1 - CEILING, CEILING)
    )
    logits_NC = np.log(p_NC) - np.log1p(-p_NC)
    told = {}
    for column, logits_N in zip(columns, logits_NC.T, strict=True):
        ne = (
            None
            if np.isnan(logits_N).any()
            else MetricState.from_logits(logits_N, y_N).figures()["ne"]
        )
        if ne is not None:
            told[column] = ne
    return told
