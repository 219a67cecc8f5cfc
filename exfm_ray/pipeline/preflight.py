"""Prepare the stream and check that the models fit it, before anything is trained."""

from __future__ import annotations

import torch

from exfm_ray.config.models import ModelConfig
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.data.prepare.prepare import follow, prepare
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.models.network import Network
from exfm_ray.schema import Schema
from exfm_ray.stores.user_history import check_history
from exfm_ray.tracking.progress import ProgressView
from exfm_ray.training.job import fm_tasks
from exfm_ray.training.table_sharing import check_sharing

TABLE_DIM_MULTIPLE = 4


def prepare_stream(config: Config) -> EventStream:
    """Prepare the config's stream and check that the models fit it."""
    if config.data.follow:
        stream = prepare(config)
        check_models(config, stream.schema)
        return stream
    embedded = config.data.synthetic
    done = 0
    total = (
        embedded.windows * embedded.events_per_window
        if config.data.source == "synthetic"
        else config.data.max_rows
    )
    with ProgressView({"prepare": total}) as view:

        def progress(window: int, rows: int) -> None:
            nonlocal done
            done += rows
            view.update({"prepare": (window, done)})

        stream = prepare(config, progress, lambda schema: check_models(config, schema))
    check_models(
        config, stream.schema
    )  # once more, where the stream was there already and its raw data are not
    return stream


def follow_stream(config: Config) -> EventStream:
    """Take what comes into a followed stream until it ends, and check that the models fit it."""
    done = 0
    with ProgressView({"prepare": None}) as view:

        def progress(window: int, rows: int) -> None:
            nonlocal done
            done += rows
            view.update({"prepare": (window, done)})

        return follow(config, progress, lambda schema: check_models(config, schema))


def check_models(config: Config, schema: Schema) -> None:
    """UserError where the FM or a VM names a task or domain that the stream does not have."""
    try:
        for task in fm_tasks(config, schema):
            schema.task_index(task)
    except ValueError as error:
        raise UserError(f"setting 'fm.tasks': {error}") from None
    for i, student in enumerate(config.vm.models):
        _check_student(f"vm.models.{i}", student, config, schema)
    _check_sizes("fm.model", config.fm.model, schema)
    check_sharing(config, schema)
    check_history(config, schema)
    for i, student in enumerate(config.vm.models):
        _check_sizes(
            f"vm.models.{i}.model" if student.model else "vm.model",
            student.model or config.vm.model,
            schema,
        )


def _check_student(
    setting: str,
    student: StudentConfig,
    config: Config,
    schema: Schema,
) -> None:
    try:
        schema.domain_index(student.domain)
    except ValueError as error:
        raise UserError(f"setting '{setting}.domain': {error}") from None
    for task in student.tasks:
        try:
            schema.task_index(task)
        except ValueError as error:
            raise UserError(f"setting '{setting}.task': {error}") from None
        taught = _taught(config, schema, student.teacher)
        if (
            any(arm.uses_supervision for arm in config.vm.arms)
            and taught is not None
            and task not in taught
        ):
            of = f"the tasks of '{student.teacher}'" if student.teacher else "fm.tasks"
            raise UserError(
                f"setting '{setting}.task': '{task}' is none of {of}, so '{student.name}' would have no teacher for it"
            )


def _taught(
    config: Config,
    schema: Schema,
    teacher: str | None,
) -> tuple[str, ...] | None:
    """The tasks that a teacher predicts; None for another run's, whose snapshots will tell."""
    if teacher in (None, config.fm.name):
        return fm_tasks(config, schema)
    return next((student.tasks for student in config.vm.models if student.name == teacher), None)


def _check_sizes(
    setting: str,
    model: ModelConfig,
    schema: Schema,
) -> None:
    """Build the network without memory for it: sizes that do not fit are found before any worker
    starts."""
    if model.dim % TABLE_DIM_MULTIPLE:
        up = -(-model.dim // TABLE_DIM_MULTIPLE) * TABLE_DIM_MULTIPLE
        raise UserError(
            f"setting '{setting}.dim' is {model.dim}: fbgemm's tables take multiples of {TABLE_DIM_MULTIPLE}; set it to {up}"
        )
    try:
        with torch.device("meta"):
            Network(model, schema, tasks=1)
    except ValueError as error:
        raise UserError(f"setting '{setting}': {error}") from None
