"""What an external teacher saves: seconds and FLOPs to train S vertical models, against a teacher
that runs live in each model's step.

All in one process, on the same windows, each model on its domain's rows:
- external: the FM learns all rows once, scores them once, and every vertical model learns from what
  it wrote (arm ah_sa);
- live: in every vertical model's step the teacher, which is a trained snapshot, scores the batch;
- co-distillation: in every vertical model's step a teacher of its own scores the batch and learns
  it, with one forward pass.
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
from exfm_ray.models.serialization import LocalModel
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


def train_fm(settings: Config, windows: Sequence[int]) -> None:
    """Train the FM on windows in this process; it publishes a snapshot after each."""
    init_single_process()
    job = Job("fm", settings)
    worker = Worker(job, None, InMemoryReport(), CPU)
    worker.loop.client = LocalClient(worker.loop.reader, job.passes(windows, BEGINNING))  # type: ignore[assignment]
    worker.run(windows, BEGINNING)


def students(settings: Config, number: int) -> tuple[StudentConfig, ...]:
    """The demo's vertical models in turn, under different names."""
    models = settings.vm.models
    return tuple(
        models[i % len(models)].model_copy(update={"name": f"vm{i}"}) for i in range(number)
    )


def batches(group: BatchGroup, tables: Sequence[pa.Table]) -> Iterator[pa.Table]:
    """A model's rows in its batches."""
    regroup = Rebatcher(group.batch_size)
    for table in tables:
        yield from regroup.add(group.select(table))
    yield from regroup.flush()


def taught(
    rows: pa.Table,
    p_NT: torch.Tensor,
    columns: Sequence[int],
) -> pa.Table:
    """Rows with a teacher's predictions of the model's tasks, as the reader of supervision gives
    them."""
    chosen = p_NT[:, list(columns)].numpy()
    return rows.append_column(
        TEACHER_COLUMN, pa.FixedSizeListArray.from_arrays(pa.array(chosen.ravel()), chosen.shape[1])
    )


def vm_group(
    settings: Config,
    student: StudentConfig,
    stream: EventStream,
) -> BatchGroup:
    """A fresh vertical model, arm ah_sa."""
    (group,) = build_groups(Job("vm", settings, (student,)), stream.schema, CPU)
    return group


def timed(work: Callable[[Sequence[StudentConfig]], None], own: Sequence[StudentConfig]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work(own)
    return time.perf_counter() - started


def external(
    settings: Config,
    own: Sequence[StudentConfig],
    windows: Sequence[int],
) -> None:
    """FM, DAS and vertical models, each once over the windows."""
    stream = EventStream.open(settings.folder / "stream")
    fm = build_groups(Job("fm", settings), stream.schema, CPU)[0]
    das = Labeler(settings, stream)
    remove_tree(das.store.root / settings.fm.name)
    for table in (
        stream.read(w, fragment) for w in windows for fragment in stream.window(w).fragments
    ):
        for rows in batches(fm, [table]):
            fm.learn(rows)
    das.label_locally(windows)
    for student in own:
        group = vm_group(settings, student, stream)
        for window in windows:
            manifest = stream.window(window)
            tables = [
                das.store.join(window, f, stream.read(window, f), student.tasks)
                for f in manifest.fragments
            ]
            for rows in batches(group, tables):
                group.learn(rows)


def live(
    settings: Config,
    own: Sequence[StudentConfig],
    windows: Sequence[int],
    learns: bool,
) -> None:
    """The teacher in each vertical model's step: a snapshot, or (`learns`) one that learns the
    batch, too."""
    stream = EventStream.open(settings.folder / "stream")
    tasks = stream.schema.tasks
    snapshot: LocalModel = Labeler(settings, stream).snapshots.load(1, stream.schema.digest)[0]
    for student in own:
        group = vm_group(settings, student, stream)
        columns = [tasks.index(task) for task in student.tasks]
        teacher = (
            build_groups(Job("fm", settings), stream.schema, CPU)[0].trainers[0] if learns else None
        )
        for window in windows:
            tables = [stream.read(window, fragment) for fragment in stream.window(window).fragments]
            for rows in batches(group, tables):
                batch = to_batch(rows, stream.schema)
                p_NT = step(teacher, batch) if teacher else snapshot.score(batch)
                group.learn(taught(rows, p_NT, columns))


def step(trainer: ModelTrainer, batch: Batch) -> torch.Tensor:
    """A teacher's predictions of a batch, from the forward pass in which it learns it."""
    serving_BT = trainer.engine.forward(batch, None).serving_BT
    loss_B = labels_objective_B(serving_BT, batch.labels_BT[:, list(trainer.tasks)])
    p_BT = torch.sigmoid(serving_BT.detach())
    trainer.engine.update(loss_B.mean())
    return p_BT


def flops(
    settings: Config,
    own: Sequence[StudentConfig],
    windows: Sequence[int],
) -> dict[str, float]:
    """Of the matrix products of the interaction models, all rows of `windows` together."""
    stream = EventStream.open(settings.folder / "stream")
    schema = stream.schema
    dense = len(stream.schema.dense)
    fragments = [fragment for window in windows for fragment in stream.window(window).fragments]
    inputs = Layout.from_config(settings.fm.model, schema).inputs(dense)
    once = forward_flops(settings.fm.model, inputs)
    learning = training_flops(settings.fm.model, inputs)
    total = sum(fragment.rows for fragment in fragments)
    vms = rows = 0
    for student in own:
        mine = sum(
            fragment.domain_rows[schema.domain_index(student.domain)] for fragment in fragments
        )
        model = student.model or settings.vm.model
        rows += mine
        vms += mine * training_flops(model, Layout.from_config(model, schema).inputs(dense))
    return {
        "external": total * (once + learning) + vms,
        "live": rows * once + vms,
        "co_distillation": rows * learning + vms,
    }


def saving(
    settings: Config,
    windows: Sequence[int],
    quick: bool,
) -> dict[str, Any]:
    """S -> seconds and FLOPs of each way, and what the external teacher saves of
    co-distillation's."""
    init_single_process()
    settings = settings.model_copy(
        update={"vm": settings.vm.model_copy(update={"arms": (Arm("ah_sa"),)})}
    )
    windows = windows[1:2] if quick else windows[1:3]  # the ones that have a teacher
    told = {}
    ways: dict[str, Callable[[Sequence[StudentConfig]], None]] = {
        "external": lambda own: external(settings, own, windows),
        "live": lambda own: live(settings, own, windows, learns=False),
        "co_distillation": lambda own: live(settings, own, windows, learns=True),
    }
    for work in ways.values():  # the first steps of a process take longer
        work(students(settings, 1))
    for number in MODELS:
        own = students(settings, number)
        rounds = [
            {way: timed(work, own) for way, work in ways.items()} for _ in range(1 if quick else 3)
        ]
        seconds = {way: statistics.median(r[way] for r in rounds) for way in ways}
        counted = flops(settings, own, windows)
        saved = {
            f"{name}_saved": 1 - all_of["external"] / all_of["co_distillation"]
            for name, all_of in (("seconds", seconds), ("flops", counted))
        }
        told[str(number)] = {"seconds": seconds, "flops": counted, **saved}
        line = ", ".join(
            f"{way} {seconds[way]:.1f} s {counted[way] / 1e9:.1f} GFLOP" for way in seconds
        )
        told_of = f"{saved['seconds_saved']:.0%} of co-distillation's seconds, {saved['flops_saved']:.0%} of its FLOPs"
        print(
            f"{number} vertical model(s): {line}; the external teacher saves {told_of}", flush=True
        )
    return told
