"""Prepare the stream, and check settings and inputs before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from exfm_ray.config.arms import LABELS
from exfm_ray.config.models import ModelConfig
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.das.labeler import Labeler
from exfm_ray.data.prepare.prepare import follow, prepare
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.models.network import Network
from exfm_ray.pipeline.schedule import Role, Workload
from exfm_ray.schema import Schema
from exfm_ray.stores.user_history import check_history
from exfm_ray.tracking.progress import ProgressView
from exfm_ray.training.job import Job, fm_tasks
from exfm_ray.training.table_sharing import check_sharing

TABLE_DIM_MULTIPLE = 4


def prepare_stream(config: Config) -> EventStream:
    """Prepare the config's stream and check that the models fit it."""
    if config.data.follow:
        stream = prepare(config)
        check_models(config, stream.schema)
        return stream

    total: int | None = config.data.max_rows
    if config.data.source == "synthetic":
        synthetic = config.data.synthetic
        total = synthetic.windows * synthetic.events_per_window
    with ProgressView({"prepare": total}) as view:
        progress = _row_counter(view)
        stream = prepare(config, progress, lambda schema: check_models(config, schema))
    # Check again: an existing stream is not prepared, even if its raw data are gone.
    check_models(config, stream.schema)
    return stream


def follow_stream(config: Config) -> EventStream:
    """Append arriving data to a followed stream until it ends. Check that the models fit it."""
    with ProgressView({"prepare": None}) as view:
        progress = _row_counter(view)
        return follow(config, progress, lambda schema: check_models(config, schema))


def _row_counter(view: ProgressView) -> Callable[[int, int], None]:
    """A callback for `prepare` that shows the window and the number of rows so far."""
    done = 0

    def progress(window: int, rows: int) -> None:
        nonlocal done
        done += rows
        view.update({"prepare": (window, done)})

    return progress


def check_models(config: Config, schema: Schema) -> None:
    """Check that the models fit the stream.

    Raises:
        UserError: the FM or a VM names a task or domain that the stream does not have, or its
            sizes do not fit.
    """
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
        setting = f"vm.models.{i}.model" if student.model else "vm.model"
        _check_sizes(setting, student.model or config.vm.model, schema)


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
        _check_teacher(setting, student, task, config, schema)


def _check_teacher(
    setting: str,
    student: StudentConfig,
    task: str,
    config: Config,
    schema: Schema,
) -> None:
    """Check that the student's teacher predicts a task, if any arm needs its predictions."""
    predicted = _predicted_tasks(config, schema, student.teacher)
    needs_teacher = any(arm.uses_supervision for arm in config.vm.arms)
    if not needs_teacher or predicted is None or task in predicted:
        return
    of = f"the tasks of '{student.teacher}'" if student.teacher else "fm.tasks"
    raise UserError(
        f"setting '{setting}.task': '{task}' is none of {of}, so '{student.name}' would have no "
        "teacher for it"
    )


def _predicted_tasks(
    config: Config,
    schema: Schema,
    teacher: str | None,
) -> tuple[str, ...] | None:
    """The tasks that a teacher predicts; None for another run's, whose snapshots name them."""
    if teacher in (None, config.fm.name):
        return fm_tasks(config, schema)
    for student in config.vm.models:
        if student.name == teacher:
            return student.tasks
    return None


def _check_sizes(
    setting: str,
    model: ModelConfig,
    schema: Schema,
) -> None:
    """Build the network without memory, to find sizes that do not fit before any worker starts."""
    if model.dim % TABLE_DIM_MULTIPLE:
        rounded_up = -(-model.dim // TABLE_DIM_MULTIPLE) * TABLE_DIM_MULTIPLE
        raise UserError(
            f"setting '{setting}.dim' is {model.dim}: fbgemm's tables take multiples of "
            f"{TABLE_DIM_MULTIPLE}; set it to {rounded_up}"
        )
    try:
        with torch.device("meta"):
            Network(model, schema, tasks=1)
    except ValueError as error:
        raise UserError(f"setting '{setting}': {error}") from None


def check_static(
    config: Config,
    windows: Sequence[int],
    roles: frozenset[Role],
) -> None:
    """Check that a static set can be trained.

    Raises:
        UserError: a DAS is requested, which needs an order in time, or the validation window or
            all windows before it are missing.
    """
    static = Job("fm", config).static(windows)
    if static is None:
        return
    if Role.DAS in roles:
        raise UserError(
            "fm.static is set: a static set has no order in time and so no DAS; run train-fm, "
            "or remove fm.static"
        )
    validation = static.config.validation_window
    if not static.training or validation not in windows:
        raise UserError(
            f"setting 'fm.static.validation_window' is {validation}, the stream has windows "
            f"{windows[0]} to {windows[-1]}; windows before it are learned "
            "(data.window.by=file makes each file a window)"
        )


def check_inputs(
    config: Config,
    labelers: Sequence[Labeler],
    workload: Workload,
    roles: frozenset[Role],
) -> None:
    """Check that every input exists or will be produced by one of the roles.

    Raises:
        UserError: a role would wait forever for an input.
    """
    for labeler in labelers:
        windows = workload.scoring.get(labeler.spec.role, [])
        if windows:
            _check_other_run(labeler)
        made_here = bool(workload.vm_jobs) if labeler.teacher else Role.FM in roles
        if not made_here:
            _check_snapshots(labeler, windows)
    needs_supervision = set(config.vm.arms) != {LABELS}
    if Role.DAS not in roles and needs_supervision:
        for labeler in labelers:
            _check_supervised(labeler, workload)


def _check_other_run(labeler: Labeler) -> None:
    """Check that the other run whose FM is the teacher has published a snapshot."""
    teacher = labeler.teacher
    if teacher and teacher.run and not labeler.snapshots.versions():
        raise UserError(
            f"{labeler.snapshots.root}: no snapshot of teacher '{teacher.name}'; train it first, "
            "with das.keep_snapshots"
        )


def _check_snapshots(labeler: Labeler, windows: Sequence[int]) -> None:
    """Check that the snapshots that supervise these windows exist."""
    for window in windows:
        version = labeler.spec.policy.version(window)
        if version is None or labeler.snapshots.has(version):
            continue
        snapshot = labeler.snapshots.folder(version)
        command = "train-vm" if labeler.teacher else "train-fm"
        raise UserError(
            f"window {window} is to be scored by {snapshot}, which is not there; "
            f"run {command} first"
        )


def _check_supervised(labeler: Labeler, workload: Workload) -> None:
    """Check that the supervision that the jobs read has been written."""
    teacher = labeler.store.teacher
    windows = set()
    for job in workload.jobs_taught_by(teacher):
        windows.update(workload.learnable[job.name])
    missing = labeler.missing(sorted(windows))
    if missing:
        raise UserError(
            f"{labeler.store.root}: no supervision of window {missing[0]} by '{teacher}'; "
            "run das first"
        )
