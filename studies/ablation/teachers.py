"""Teachers of the ablation study, and the students' rows with all their predictions.

Each teacher is trained once for each seed, without Ray's feeds and files. A teacher that has
learned windows < t predicts windows t + lag - 1: rule 2 names this version for them. The base FM
predicts for lags 1, 2, 4 and 8, all others for lag 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
"""Window -> float32 probabilities (N,) of the student's rows in it, in the stream's order.

Windows without supervision are left out.
"""
Column = tuple[int, str]
"""Seed and name of a teacher: the key of one column of predictions."""


class Teacher(NamedTuple):
    """A model that teaches students.

    Attributes:
        name: FM, a size, student_sized or one_domain.
        settings: dotted setting -> value; they replace those of the config.
        students: the students that it teaches.
        lags: lags for which it predicts.
        domain: the only domain that it learns; None for all.
    """

    name: str
    settings: dict[str, object]
    students: tuple[StudentConfig, ...]
    lags: tuple[int, ...] = (1,)
    domain: str | None = None

    def column(self, lag: int) -> str:
        """Return the name of its predictions at this lag."""
        return f"lag {lag}" if self.name == FM else self.name


def teachers(config: Config, lags: tuple[int, ...]) -> list[Teacher]:
    """Return the teachers of a study.

    They are the base FM, FMs of other sizes, the students' own networks trained on all domains with
    the students' settings, and an FM for each domain.
    """
    students = config.vm.models
    all_teachers = [Teacher(FM, {}, students, lags)]
    for size, model in SIZES.items():
        settings: dict[str, object] = {"fm.model": {**model, "dim": config.fm.model.dim}}
        all_teachers.append(Teacher(size, settings, students))
    all_teachers += _student_sized(config)
    for domain in dict.fromkeys(student.domain for student in students):
        of_domain = tuple(student for student in students if student.domain == domain)
        all_teachers.append(Teacher("one_domain", {}, of_domain, domain=domain))
    return all_teachers


def _student_sized(config: Config) -> Iterator[Teacher]:
    """A teacher for each network of the students, trained as the students are."""
    students_of: list[tuple[Any, list[StudentConfig]]] = []
    for student in config.vm.models:
        network = student.model or config.vm.model
        for other, students in students_of:
            if other == network:
                students.append(student)
                break
        else:
            students_of.append((network, [student]))

    for network, students in students_of:
        settings = {
            "fm.model": network.model_dump(mode="json"),
            "fm.batch_size": config.vm.batch_size,
            "fm.optimizer": config.vm.optimizer.model_dump(mode="json"),
        }
        yield Teacher("student_sized", settings, tuple(students))


def teach(
    config: Config,
    teacher: Teacher,
    seed: int,
    windows: int,
) -> dict[tuple[str, str], WindowPredictions]:
    """Train one teacher over windows 0 to `windows` - 1 and predict each window before learning it.

    Returns:
        (student, column) -> predictions.
    """
    torch.set_num_threads(1)
    job = Job("fm", with_settings(config, {**teacher.settings, "seed": seed}))
    schema = EventStream.open(job.stream_root).schema
    learned_domains = range(len(schema.domains))
    if teacher.domain is not None:
        position = schema.domain_index(teacher.domain)
        learned_domains = range(position, position + 1)
    taught_domains = sorted({schema.domain_index(student.domain) for student in teacher.students})
    learned_rows = _reader(job, learned_domains)
    taught_rows = _reader(job, taught_domains)

    loop, _ = local_loop(job, range(windows), learned_rows)
    (trainer,) = loop.groups[0].trainers
    predictions: dict[tuple[str, str], WindowPredictions] = {}
    for student in teacher.students:
        for lag in teacher.lags:
            predictions[student.name, teacher.column(lag)] = {}

    for version in range(windows):
        for lag in teacher.lags if version else ():
            window = version + lag - 1
            assert newest_allowed_version(window, lag) == version, "rule 2"
            evaluated = _evaluate(loop, taught_rows, window) if window < windows else None
            if evaluated is None:  # after the end, or none of the students has a row in it
                continue
            for student in teacher.students:
                task = trainer.tasks.index(schema.task_index(student.tasks[0]))
                is_own_N = evaluated.domain_N == schema.domain_index(student.domain)
                logits_N = evaluated.logits[trainer.name][:, task][is_own_N]
                p_N = torch.from_numpy(logits_N).sigmoid().numpy()
                predictions[student.name, teacher.column(lag)][window] = p_N
        if version < windows - 1:
            window_pass = WindowPass(version, "learn")
            _set_next_pass(loop, learned_rows, window_pass)
            loop.run_passes([window_pass], version)
    return predictions


def _reader(job: Job, domains: Sequence[int]) -> AugmentedReader:
    """A reader of these domains' rows, without supervision."""
    return AugmentedReader(job.stream_root, None, SnapshotPolicy(1), tuple(domains), ())


def _evaluate(
    loop: Loop,
    reader: FragmentReader,
    window: int,
) -> Predictions | None:
    """The current model's predictions for the reader's rows of a window."""
    window_pass = WindowPass(window, "evaluate")
    _set_next_pass(loop, reader, window_pass)
    return loop._evaluate(window_pass)[0]


def _set_next_pass(
    loop: Loop,
    reader: FragmentReader,
    window_pass: WindowPass,
) -> None:
    """Make the loop read this pass next, from `reader`."""
    client: Any = LocalClient(reader, [window_pass])
    loop.reader = reader
    loop.client = client


def controls(
    labels: Mapping[int, np.ndarray],
    predictions: WindowPredictions,
    seed: int,
) -> dict[str, WindowPredictions]:
    """Return the predictions of teachers that know nothing.

    `shuffled`: the FM's predictions, permuted within the window. `constant`: the mean label of the
    windows before. `own_label`: the example's own label.

    Args:
        labels: window -> float32 labels (N,) of the student's rows.
        predictions: those of the base FM at lag 1.
    """
    by_control: dict[str, WindowPredictions] = {name: {} for name in CONTROL_TEACHERS}
    for window, p_N in predictions.items():
        rng = np.random.default_rng((seed, window))
        earlier_N = np.concatenate(
            [labels_N for other, labels_N in labels.items() if other < window]
        )
        mean_label = earlier_N.mean() if len(earlier_N) else np.nan
        by_control["shuffled"][window] = rng.permutation(p_N)
        by_control["constant"][window] = np.full(len(labels[window]), mean_label, np.float32)
        by_control["own_label"][window] = labels[window]
    return by_control


def student_rows(
    config: Config,
    student: StudentConfig,
    windows: int,
    predictions: Mapping[int, Mapping[str, WindowPredictions]],
) -> tuple[StudentRows, list[Column]]:
    """Read the student's rows with a column of predictions for each seed and teacher.

    A window is one table. A prediction is NaN where the teacher does not supervise.

    Args:
        predictions: seed -> teacher -> predictions; every seed has the same teachers, "lag 1" among
            them.

    Returns:
        The rows, and the key of each column.
    """
    stream = EventStream.open(config.folder / "stream")
    tables = _window_tables(stream, student, windows)
    task = stream.schema.task_index(student.tasks[0])
    tasks = len(stream.schema.tasks)
    labels = {
        window: list_values(table["labels"], tasks)[:, task] for window, table in tables.items()
    }
    by_column: dict[Column, WindowPredictions] = {}
    for seed, by_teacher in predictions.items():
        every_teacher = {**by_teacher, **controls(labels, by_teacher["lag 1"], seed)}
        for name, window_predictions in every_teacher.items():
            by_column[seed, name] = window_predictions

    listed: dict[int, tuple[Fragment, ...]] = dict.fromkeys(range(windows), ())
    supervised_tables = {}
    for window, table in tables.items():
        missing_N = np.full(table.num_rows, np.nan, np.float32)
        columns_N = [of_column.get(window, missing_N) for of_column in by_column.values()]
        p_NC = np.stack(columns_N, axis=1)
        file = window_name(window)
        supervised_tables[window, file] = _with_predictions(table, p_NC)
        listed[window] = (
            Fragment(file=file, rows=table.num_rows, bytes=table.nbytes, domain_rows=()),
        )
    return StudentRows(listed, supervised_tables), list(by_column)


def _window_tables(
    stream: EventStream,
    student: StudentConfig,
    windows: int,
) -> dict[int, pa.Table]:
    """Window -> the student's rows; windows without rows are left out."""
    domain = stream.schema.domain_index(student.domain)
    reader = AugmentedReader(stream.root, None, SnapshotPolicy(1), (domain,), ())
    tables = {}
    for window in range(windows):
        window_pass = WindowPass(window, "learn")
        fragments = [
            reader.read(window_pass, fragment) for fragment in reader.fragments(window_pass)
        ]
        if fragments:
            tables[window] = pa.concat_tables(fragments).combine_chunks()
    return tables


def _with_predictions(table: pa.Table, p_NC: np.ndarray) -> pa.Table:
    """The table with predictions as its teacher column."""
    column = pa.FixedSizeListArray.from_arrays(p_NC.ravel(), p_NC.shape[1])
    return table.append_column(TEACHER_COLUMN, column)


def _predictions_of(table: pa.Table) -> np.ndarray:
    """The teacher column of a table, float32 (N, C)."""
    columns = table.schema.field(TEACHER_COLUMN).type.list_size
    return list_values(table[TEACHER_COLUMN], columns)


def supervised(
    rows: StudentRows,
    chosen: Sequence[int],
    first: int,
) -> StudentRows:
    """Return the rows with some columns of predictions only.

    Args:
        chosen: positions of the columns, in the order of the result.
        first: the first window with supervision.
    """
    tables = {}
    for key, table in rows.tables.items():
        window, _ = key
        plain = table.drop_columns([TEACHER_COLUMN])
        if chosen and window >= first:
            p_NC = _predictions_of(table)[:, chosen]
            assert not np.isnan(p_NC).any(), "a chosen teacher does not supervise this window yet"
            plain = _with_predictions(plain, p_NC)
        tables[key] = plain
    return StudentRows(rows.listed, tables)


def teacher_nes(
    config: Config,
    student: StudentConfig,
    rows: StudentRows,
    columns: Sequence[Column],
    windows: range,
) -> dict[Column, float]:
    """Return the NE of each teacher that supervises all `windows`, on the student's rows."""
    schema = EventStream.open(config.folder / "stream").schema
    task = schema.task_index(student.tasks[0])
    labels_N = []
    predictions_NC = []
    for (window, _), table in sorted(rows.tables.items()):
        if window in windows:
            labels_N.append(list_values(table["labels"], len(schema.tasks))[:, task])
            predictions_NC.append(_predictions_of(table))
    y_N = np.concatenate(labels_N)
    p_NC = np.concatenate(predictions_NC).astype(np.float64).clip(1 - CEILING, CEILING)
    logits_NC = np.log(p_NC) - np.log1p(-p_NC)

    nes = {}
    for column, logits_N in zip(columns, logits_NC.T, strict=True):
        if np.isnan(logits_N).any():
            continue
        ne = MetricState.from_logits(logits_N, y_N).figures()["ne"]
        if ne is not None:
            nes[column] = ne
    return nes
