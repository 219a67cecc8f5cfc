"""What an external teacher saves: seconds and FLOPs to train S vertical models.

It is compared with a teacher that runs live in each model's step. All in one process, on the same
windows, each model on its domain's rows:
- external: the FM learns all rows once, scores them once, and every vertical model learns from
  these scores (arm ah_sa);
- live: in every vertical model's step the teacher, a trained snapshot, scores the batch;
- co-distillation: in every vertical model's step its own teacher scores the batch and learns it,
  with one forward pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch

from exfm_ray.config.arms import Arm
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.das.labeler import Labeler
from exfm_ray.data.batch import Batch, to_batch
from exfm_ray.data.rebatch import Rebatcher
from exfm_ray.data.stream import EventStream
from exfm_ray.distillation.objective import labels_objective_B
from exfm_ray.models.flops import forward_flops, training_flops
from exfm_ray.models.layout import Layout
from exfm_ray.storage.atomic import remove_tree
from exfm_ray.stores.supervision import TEACHER_COLUMN
from exfm_ray.training.checkpoint import BEGINNING
from exfm_ray.training.group import BatchGroup
from exfm_ray.training.job import Job
from exfm_ray.training.local import InMemoryReport, LocalClient, init_single_process
from exfm_ray.training.model_trainer import ModelTrainer
from exfm_ray.training.worker import Worker, build_groups

MODELS = (1, 2, 4, 8)
CPU = torch.device("cpu")
Students = Sequence[StudentConfig]
Way = Callable[[Students], None]
"""Trains students in one of the ways that are compared."""


def train_fm(settings: Config, windows: Sequence[int]) -> None:
    """Train the FM on windows in this process; it publishes a snapshot after each."""
    init_single_process()
    job = Job("fm", settings)
    worker = Worker(job, None, InMemoryReport(), CPU)
    client: Any = LocalClient(worker.loop.reader, job.passes(windows, BEGINNING))
    worker.loop.client = client
    worker.run(windows, BEGINNING)


def students(settings: Config, number: int) -> tuple[StudentConfig, ...]:
    """Return the demo's vertical models in turn, under different names."""
    models = settings.vm.models
    return tuple(
        models[i % len(models)].model_copy(update={"name": f"vm{i}"}) for i in range(number)
    )


def batches(group: BatchGroup, tables: Sequence[pa.Table]) -> Iterator[pa.Table]:
    """Yield a model's rows in its batches."""
    rebatcher = Rebatcher(group.batch_size)
    for table in tables:
        yield from rebatcher.add(group.select(table))
    yield from rebatcher.flush()


def with_predictions(
    rows: pa.Table,
    p_NT: torch.Tensor,
    columns: Sequence[int],
) -> pa.Table:
    """Return rows with a teacher's predictions, as the reader of supervision does.

    Args:
        p_NT: predictions of all tasks.
        columns: positions of the model's tasks.
    """
    chosen = p_NT[:, list(columns)].numpy()
    values = pa.array(chosen.ravel())
    column = pa.FixedSizeListArray.from_arrays(values, chosen.shape[1])
    return rows.append_column(TEACHER_COLUMN, column)


def vm_group(
    settings: Config,
    student: StudentConfig,
    stream: EventStream,
) -> BatchGroup:
    """Build a new vertical model in the arm ah_sa."""
    (group,) = build_groups(Job("vm", settings, (student,)), stream.schema, CPU)
    return group


def fm_group(settings: Config, stream: EventStream) -> BatchGroup:
    """Build a new FM."""
    (group,) = build_groups(Job("fm", settings), stream.schema, CPU)
    return group


def seconds_of(way: Way, models: Students) -> float:
    """Train the models in this way; seconds."""
    started = time.perf_counter()
    way(models)
    return time.perf_counter() - started


def external(
    settings: Config,
    models: Students,
    windows: Sequence[int],
) -> None:
    """Run FM, DAS and vertical models, each once over the windows."""
    stream = EventStream.open(settings.folder / "stream")
    fm = fm_group(settings, stream)
    das = Labeler(settings, stream)
    remove_tree(das.store.root / settings.fm.name)
    for window in windows:
        for fragment in stream.window(window).fragments:
            for rows in batches(fm, [stream.read(window, fragment)]):
                fm.learn(rows)
    das.label_locally(windows)

    for student in models:
        group = vm_group(settings, student, stream)
        for window in windows:
            tables = [
                das.store.join(window, fragment, stream.read(window, fragment), student.tasks)
                for fragment in stream.window(window).fragments
            ]
            for rows in batches(group, tables):
                group.learn(rows)


def live(
    settings: Config,
    models: Students,
    windows: Sequence[int],
    learns: bool,
) -> None:
    """Run the teacher in each vertical model's step.

    Args:
        learns: whether the teacher learns the batch, too; otherwise it is a snapshot.
    """
    stream = EventStream.open(settings.folder / "stream")
    snapshots = Labeler(settings, stream).snapshots
    snapshot, _ = snapshots.load(1, stream.schema.digest)
    for student in models:
        group = vm_group(settings, student, stream)
        columns = [stream.schema.tasks.index(task) for task in student.tasks]
        teacher = fm_group(settings, stream).trainers[0] if learns else None
        for window in windows:
            tables = [stream.read(window, fragment) for fragment in stream.window(window).fragments]
            for rows in batches(group, tables):
                batch = to_batch(rows, stream.schema)
                p_NT = step(teacher, batch) if teacher else snapshot.score(batch)
                group.learn(with_predictions(rows, p_NT, columns))


def step(trainer: ModelTrainer, batch: Batch) -> torch.Tensor:
    """Let a teacher learn a batch; its predictions from the same forward pass."""
    serving_BT = trainer.engine.forward(batch, None).serving_BT
    labels_BT = batch.labels_BT[:, list(trainer.tasks)]
    loss_B = labels_objective_B(serving_BT, labels_BT)
    p_BT = torch.sigmoid(serving_BT.detach())
    trainer.engine.update(loss_B.mean())
    return p_BT


def flops(
    settings: Config,
    models: Students,
    windows: Sequence[int],
) -> dict[str, float]:
    """Return the FLOPs of each way: matrix products of the interaction models, all rows."""
    stream = EventStream.open(settings.folder / "stream")
    schema = stream.schema
    dense = len(schema.dense)
    fragments = [fragment for window in windows for fragment in stream.window(window).fragments]
    fm_inputs = Layout.from_config(settings.fm.model, schema).inputs(dense)
    scoring = forward_flops(settings.fm.model, fm_inputs)
    learning = training_flops(settings.fm.model, fm_inputs)
    all_rows = sum(fragment.rows for fragment in fragments)

    student_flops = 0
    student_rows = 0
    for student in models:
        domain = schema.domain_index(student.domain)
        rows = sum(fragment.domain_rows[domain] for fragment in fragments)
        model = student.model or settings.vm.model
        inputs = Layout.from_config(model, schema).inputs(dense)
        student_rows += rows
        student_flops += rows * training_flops(model, inputs)
    return {
        "external": all_rows * (scoring + learning) + student_flops,
        "live": student_rows * scoring + student_flops,
        "co_distillation": student_rows * learning + student_flops,
    }


def saving(
    settings: Config,
    windows: Sequence[int],
    quick: bool,
) -> dict[str, Any]:
    """Measure each way with 1, 2, 4 and 8 vertical models.

    Returns:
        Number of models -> seconds and FLOPs of each way, and the fractions of co-distillation's
        that the external teacher saves.
    """
    init_single_process()
    one_arm = settings.vm.model_copy(update={"arms": (Arm("ah_sa"),)})
    settings = settings.model_copy(update={"vm": one_arm})
    windows = windows[1:2] if quick else windows[1:3]  # the ones that have a teacher
    repetitions = 1 if quick else 3
    ways: dict[str, Way] = {
        "external": lambda models: external(settings, models, windows),
        "live": lambda models: live(settings, models, windows, learns=False),
        "co_distillation": lambda models: live(settings, models, windows, learns=True),
    }
    for way in ways.values():  # the first steps of a process take longer
        way(students(settings, 1))

    by_number = {}
    for number in MODELS:
        models = students(settings, number)
        rounds = [
            {name: seconds_of(way, models) for name, way in ways.items()}
            for _ in range(repetitions)
        ]
        seconds = {
            name: statistics.median(one_round[name] for one_round in rounds) for name in ways
        }
        counted = flops(settings, models, windows)
        seconds_saved = 1 - seconds["external"] / seconds["co_distillation"]
        flops_saved = 1 - counted["external"] / counted["co_distillation"]
        by_number[str(number)] = {
            "seconds": seconds,
            "flops": counted,
            "seconds_saved": seconds_saved,
            "flops_saved": flops_saved,
        }
        costs = [f"{name} {seconds[name]:.1f} s {counted[name] / 1e9:.1f} GFLOP" for name in ways]
        print(
            f"{number} vertical model(s): {', '.join(costs)}; the external teacher saves "
            f"{seconds_saved:.0%} of co-distillation's seconds, {flops_saved:.0%} of its FLOPs",
            flush=True,
        )
    return by_number
