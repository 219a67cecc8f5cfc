"""Trials of one student and arm that learn together, window by window, and their scores."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple

import torch

from exfm_ray.config.checks import with_settings
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.config.tune import Settings
from exfm_ray.data.readers import FragmentReader, WindowPass
from exfm_ray.data.stream import EventStream
from exfm_ray.metrics.state import MetricState
from exfm_ray.training.job import Job
from exfm_ray.training.local import init_single_process, local_loop
from exfm_ray.training.stacked_trainer import StackedTrainer, stacked

OUTSIDE = 1.0
"""Cost of leaving the bounds of calibration: more than any difference in NE between good models."""

CHANCE = 1.96
"""Standard errors of calibration that an unbiased model exceeds once in 20 times."""


class Figures(NamedTuple):
    """How good a student is over the counted windows so far.

    Attributes:
        window: the last window that counts.
        ne: normalized entropy, mean over the tasks.
        calibration: of the task whose calibration is farthest from 1.
        labels: sum of the labels, of the task with the fewest: how certain calibration is.
    """

    window: int
    ne: float
    calibration: float
    labels: float


Outcome = Figures | str | None
"""Figures so far; the error of a failed training; None before the first counted window."""

Exploit = tuple[int, int, Job]
"""Source, target and the target's new job.

The target takes the source's weights, optimizer state and figures, and continues with the job.
"""


def score(figures: Figures, bounds: tuple[float, float]) -> float:
    """Return NE, plus a penalty where calibration is out of bounds. Lower is better.

        beyond = distance to the nearer bound - 1.96 * calibration / sqrt(labels)
        score  = NE                         where beyond <= 0
                 NE + `OUTSIDE` + beyond    elsewhere

    Labels are counts of rare events, so their sum n has the standard error sqrt(n) (Poisson).
    Calibration is the sum of the predictions over n, so its standard error is
    calibration / sqrt(n) to first order. A trial that is beyond chance ranks behind all that are
    not, and the farther beyond, the farther behind.
    """
    low, high = bounds
    calibration = figures.calibration
    distance = max(low - calibration, calibration - high)
    chance = CHANCE * calibration / math.sqrt(figures.labels)
    beyond = max(distance - chance, 0.0)
    penalty = OUTSIDE + beyond if beyond else 0.0
    return figures.ne + penalty


def trial_job(
    config: Config,
    student: StudentConfig,
    arm: str,
    settings: Settings,
    count_from: int,
    seed: int | None = None,
) -> Job:
    """Return the job of one trial: one student, one arm, one process.

    Args:
        settings: dotted setting -> value; they replace those of the config.
        count_from: first window whose examples count in the figures.
        seed: None for the config's.
    """
    fixed = {
        "vm.models": [student.model_dump(mode="json")],
        "vm.arms": [str(arm)],
        "vm.workers": 1,
        "metrics.warmup_windows": count_from,
        "seed": config.seed if seed is None else seed,
    }
    return Job("trial", with_settings(config, {**fixed, **settings}), (student,))


def learn(
    jobs: Sequence[Job],
    reader: FragmentReader,
    windows: Sequence[int],
    teachers: Sequence[int] | None = None,
) -> Generator[list[Outcome], Sequence[Exploit] | None, None]:
    """Train the jobs together and yield an outcome for each job after each window's evaluation.

    A window is learned when the next outcomes are requested. The last window is never learned,
    because nothing is evaluated after it. A failed job stays failed, unless it is the target of an
    exploit that the caller sends (population-based training).

    Args:
        jobs: of the same student, arm and settings, apart from `STACKABLE` ones and the seed. A
            single job learns exactly as in a run.
        teachers: for each job, which teacher it learns from, where `reader` returns the
            predictions of several teachers side by side.
    """
    torch.set_num_threads(jobs[0].trainer.threads or 1)
    init_single_process()
    training = _Training(jobs, reader, windows, teachers)
    for window in windows:
        training.run_pass(WindowPass(window, "evaluate"))
        exploits = yield training.outcomes(window)
        for source, target, job in exploits or ():
            training.exploit(source, target, job)
        if window != windows[-1] and not training.all_failed:
            training.run_pass(WindowPass(window, "learn"))


class _Training:
    """One model, or a stack of models, that learns the windows."""

    def __init__(
        self,
        jobs: Sequence[Job],
        reader: FragmentReader,
        windows: Sequence[int],
        teachers: Sequence[int] | None,
    ) -> None:
        first_job = jobs[0]
        self._stack: StackedTrainer | None = None
        self._names = [first_job.students[0].name]
        groups = None
        if len(jobs) > 1 or teachers:
            schema = EventStream.open(first_job.stream_root).schema
            self._stack, group = stacked(jobs, schema, teachers or [0] * len(jobs))
            self._names = [name.model for name in self._stack.all_model_names]
            groups = [group]
        self._loop, _ = local_loop(first_job, windows, reader, groups)
        self._count_from = first_job.config.metrics.warmup_windows
        self._errors: dict[int, str] = {}

    @property
    def all_failed(self) -> bool:
        """Whether no job is left that can learn."""
        return len(self._errors) == len(self._names)

    def run_pass(self, window_pass: WindowPass) -> None:
        """Evaluate or learn a window. An error of a training is its outcome.

        An error in a stack's data fails all its models.
        """
        try:
            self._loop.run_passes([window_pass], window_pass.window)
        except Exception as error:
            for number in range(len(self._names)):
                self._errors.setdefault(number, f"{type(error).__name__}: {error}")
        diverged = self._stack.failed if self._stack else ()
        for number in diverged:
            self._errors.setdefault(
                number,
                f"predictions of window {window_pass.window} are NaN: the model has diverged",
            )

    def outcomes(self, window: int) -> list[Outcome]:
        """Return the outcome of each job up to `window`."""
        numbers = range(len(self._names))
        if window < self._count_from:
            return [self._errors.get(number) for number in numbers]
        return [self._counted_outcome(number, window) for number in numbers]

    def _counted_outcome(self, number: int, window: int) -> Figures | str:
        if number not in self._errors:
            states = [
                state for key, state in self._loop.states.items() if key[0] == self._names[number]
            ]
            try:
                return figures_of(window, states)
            except ValueError as error:
                self._errors[number] = str(error)
        return self._errors[number]

    def exploit(
        self,
        source: int,
        target: int,
        job: Job,
    ) -> None:
        """Copy the source's weights, optimizer state and figures to the target."""
        assert self._stack, "a population has several members"
        self._stack.move(source, target, job)
        self._errors.pop(target, None)
        source_name = self._names[source]
        target_name = self._names[target]
        copied = {
            (target_name, *key[1:]): state
            for key, state in self._loop.states.items()
            if key[0] == source_name
        }
        self._loop.states |= copied


def figures_of(window: int, states: Iterable[MetricState]) -> Figures:
    """Compute the figures up to `window` from the summed state of each task.

    Raises:
        ValueError: NE or calibration is undefined or not finite.
    """
    states = list(states)
    nes = []
    calibrations = []
    for state in states:
        task_figures = state.figures()
        if task_figures["ne"] is not None and task_figures["calibration"] is not None:
            nes.append(task_figures["ne"])
            calibrations.append(task_figures["calibration"])
    if not states or len(nes) < len(states):
        raise ValueError(
            f"no examples, or labels of one kind only, up to window {window}: NE is undefined"
        )

    ne = sum(nes) / len(nes)
    calibration = max(calibrations, key=lambda value: abs(value - 1))
    if not (math.isfinite(ne) and math.isfinite(calibration)):
        raise ValueError(
            f"NE {ne} and calibration {calibration} at window {window}: the model has diverged"
        )
    return Figures(window, ne, calibration, min(state.labels for state in states))
