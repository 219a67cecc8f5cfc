"""Which windows each role can work on.

All of it follows from the stores on disk and the requested roles; nothing here needs Ray.

    the FM     learns every window whose labels are released for its tasks
    a DAS      scores a window once the snapshot that supervises it exists
    VMs        learn a window once its labels are released and its supervision is committed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from exfm_ray.config.arms import LABELS
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.das.labeler import Labeler
from exfm_ray.data.labels.releases import released_windows
from exfm_ray.data.stream import EventStream
from exfm_ray.training.job import Job, fm_tasks


class Role(StrEnum):
    """A role that a command can run."""

    FM = "fm"
    DAS = "das"
    VM = "vm"


ALL_ROLES = frozenset(Role)


@dataclass(frozen=True)
class Workload:
    """What one command has to do.

    Attributes:
        jobs: unfinished training jobs, the FM's first.
        learnable: job name -> windows that the job can learn, including those already learned.
        scoring: role name of a DAS -> windows to score; a DAS without any is left out.
    """

    jobs: Sequence[Job]
    learnable: Mapping[str, list[int]]
    scoring: Mapping[str, list[int]]

    @property
    def vm_jobs(self) -> list[Job]:
        """The unfinished jobs of vertical models."""
        return [job for job in self.jobs if job.role == Role.VM]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.jobs and not self.scoring

    def jobs_taught_by(self, teacher: str) -> list[Job]:
        """The unfinished jobs whose students read the supervision of this teacher."""
        return [job for job in self.vm_jobs if job.teacher == teacher]


class Schedule:
    """Decides which windows each role of a run can work on.

    Attributes:
        stream_is_open: whether the stream may still grow.
        windows: windows whose labels are released for all tasks of the FM.
    """

    def __init__(
        self,
        config: Config,
        stream: EventStream,
        labelers: Sequence[Labeler],
    ) -> None:
        self.config = config
        self.stream = stream
        self.labelers = labelers
        # Ask this before listing windows: the last ones must not be missed if the stream ends now.
        self.stream_is_open = not stream.complete
        self.windows = released_windows(stream, fm_tasks(config, stream.schema))

    def workload(self, jobs: Sequence[Job], roles: frozenset[Role]) -> Workload:
        """What these roles still have to do, at this moment."""
        learnable = {job.name: self.learnable_windows(job, roles) for job in jobs}
        unfinished = [job for job in jobs if not job.finished(learnable[job.name])]

        scoring = {}
        if Role.DAS in roles:
            for labeler in self.labelers:
                windows = self.scorable_windows(labeler, roles)
                if windows:
                    scoring[labeler.spec.role] = windows
        return Workload(unfinished, learnable, scoring)

    def learnable_windows(self, job: Job, roles: frozenset[Role]) -> list[int]:
        """The windows that a job can learn.

        They are released for the job's tasks. While the stream is open they are also supervised,
        or will be by the roles of this command.
        """
        if job.role == Role.FM:
            return self.windows
        released = released_windows(self.stream, job.tasks())
        if not self.stream_is_open or self._learns_from_labels_only:
            return released

        labeler = self.labeler_of(job)
        shares_tables = any(arm.shares_tables for arm in self.config.vm.arms)
        learnable = []
        for window in released:
            if not self._will_be_supervised(labeler, window, roles):
                break
            # An exported model receives the rows of the snapshot for the next window.
            if shares_tables and not self._snapshot_available(labeler, window + 1, roles):
                break
            learnable.append(window)
        return learnable

    def scorable_windows(self, labeler: Labeler, roles: frozenset[Role]) -> list[int]:
        """The windows that a DAS has not scored and can score."""
        available = [
            window
            for window in self.stream.windows()
            if self._snapshot_available(labeler, window, roles)
        ]
        return labeler.missing(available)

    def is_blocked(self, worker: Job | Labeler, learnable: Mapping[str, list[int]]) -> bool:
        """Whether a role cannot continue once labeling has failed for some windows.

        A job is blocked when its next window has no supervision. A DAS whose teacher is trained
        by a job of this run counts as blocked, because that job may be.
        """
        if isinstance(worker, Labeler):
            return worker.teacher is not None and not worker.teacher.run
        if worker.role == Role.FM or self._learns_from_labels_only:
            return False
        windows = learnable[worker.name]
        unsupervised = self.labeler_of(worker).missing(windows)
        if not unsupervised:
            return False
        learned = worker.checkpoints.latest().windows
        return learned >= windows.index(unsupervised[0])

    def labeler_of(self, job: Job) -> Labeler:
        """The DAS whose supervision a job's students read."""
        return next(labeler for labeler in self.labelers if labeler.store.teacher == job.teacher)

    @property
    def _learns_from_labels_only(self) -> bool:
        return set(self.config.vm.arms) == {LABELS}

    def _will_be_supervised(
        self,
        labeler: Labeler,
        window: int,
        roles: frozenset[Role],
    ) -> bool:
        if not labeler.missing([window]):
            return True
        return Role.DAS in roles and self._snapshot_available(labeler, window, roles)

    def _snapshot_available(
        self,
        labeler: Labeler,
        window: int,
        roles: frozenset[Role],
    ) -> bool:
        """Whether the snapshot that supervises a window exists or will be published.

        The FM publishes those of the windows that it learns in this command. Once the stream is
        complete, every snapshot counts as available.
        """
        version = labeler.spec.policy.version(window)
        if not self.stream_is_open or version is None:
            return True
        if labeler.snapshots.has(version):
            return True
        taught_by_fm = labeler.teacher is None
        return Role.FM in roles and taught_by_fm and version <= len(self.windows)


def training_jobs(config: Config, roles: frozenset[Role]) -> list[Job]:
    """The training jobs of these roles, the FM's first."""
    fm = [Job("fm", config)] if Role.FM in roles else []
    vms = vm_jobs(config) if Role.VM in roles else []
    return fm + vms


def vm_jobs(config: Config) -> list[Job]:
    """One job for all VMs of a teacher when they share a pass, else one for each VM."""
    if not config.vm.shared_pass:
        return [Job(f"vm-{student.name}", config, (student,)) for student in config.vm.models]

    students_of: dict[str, list[StudentConfig]] = {}
    for student in config.vm.models:
        teacher = student.teacher or config.fm.name
        students_of.setdefault(teacher, []).append(student)

    jobs = []
    for teacher, students in students_of.items():
        name = "vm" if teacher == config.fm.name else f"vm-of-{teacher}"
        jobs.append(Job(name, config, tuple(students)))
    return jobs
