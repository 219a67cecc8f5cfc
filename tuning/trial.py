"""Trials of one student and arm that learn together, window by window, and say after each how good
they are; their score."""

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
from exfm_ray.training.loop import Loop
from exfm_ray.training.stacked_trainer import Stack, stacked

OUTSIDE = 1.0
"""What leaving the bounds of calibration costs at once: more than any difference in NE between
models worth comparing."""

CHANCE = 1.96
"""Standard errors of calibration by which a model without bias leaves the bounds once in 20
times."""


class Figures(NamedTuple):
    """How good a student is over the windows counted so far, up to `window`: means over its tasks,
    calibration the worst one's.

    `labels` is the sum of the labels counted, the smallest of the tasks': what says how sure
    calibration is.
    """

    window: int
    ne: float
    calibration: float
    labels: float


Outcome = Figures | str | None
"""Figures so far; the error of a training that has failed; None before the first counted window."""

Exploit = tuple[int, int, Job]
"""Source, target and the target's new job: the target takes the source's weights, optimizer state
and figures, and goes on with the job."""


def score(figures: Figures, bounds: tuple[float, float]) -> float:
    """NE, where calibration lies within `bounds` or as near to them as chance may have it; else NE
    + `OUTSIDE` + what is beyond. Lower is better.

        beyond = distance to the nearer bound - 1.96 * calibration / sqrt(labels)

    The labels are counts of rare events, so their sum n has the standard error sqrt(n) (Poisson),
    and calibration, which is the sum of the predictions over n, has the standard error calibration
    / sqrt(n) to first order. A trial beyond chance ranks behind all that are not, and the further
    beyond the further behind.
    """
    distance = max(bounds[0] - figures.calibration, figures.calibration - bounds[1])
    beyond = max(distance - CHANCE * figures.calibration / math.sqrt(figures.labels), 0.0)
    return figures.ne + (OUTSIDE + beyond if beyond else 0.0)


def trial_job(
    config: Config,
    student: StudentConfig,
    arm: str,
    settings: Settings,
    count_from: int,
    seed: int | None = None,
) -> Job:
    """The job of one trial: this student, this arm, one process. Figures are summed from window
    `count_from` on."""
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
    """Train the jobs together over `windows`; yields after the evaluation of each window an outcome
    for each job, in order.

    A window is learnt when the next one is asked for; the last one never, for nothing is evaluated
    after it. A job that has failed stays failed, unless it is the target of a move that is sent
    (population-based training).

    Args:
        jobs: of the same student, arm and settings apart from `STACKABLE` ones and the seed. One
            job learns as it would in a run.
        teachers: for each job, which teacher it learns from, where `reader` gives several's
            predictions side by side.
    """
    torch.set_num_threads(jobs[0].trainer.threads or 1)
    init_single_process()
    stack = group = None
    if len(jobs) > 1 or teachers:
        stack, group = stacked(
            jobs, EventStream.open(jobs[0].stream_root).schema, teachers or [0] * len(jobs)
        )
    loop, _ = local_loop(jobs[0], windows, reader, [group] if group else None)
    names = [learner.model for learner in stack.everyone] if stack else [jobs[0].students[0].name]
    count_from = jobs[0].config.metrics.warmup_windows
    errors: dict[int, str] = {}
    for window in windows:
        _pass(loop, WindowPass(window, "evaluate"), stack, errors)
        counted = window >= count_from
        moves = yield [
            _outcome(loop, name, window, number, errors) if counted else errors.get(number)
            for number, name in enumerate(names)
        ]
        for source, target, job in moves or ():
            assert stack, "a population has several members"
            stack.move(source, target, job)
            errors.pop(target, None)
            loop.states |= {
                (names[target], *key[1:]): state
                for key, state in loop.states.items()
                if key[0] == names[source]
            }
        if window != windows[-1] and len(errors) < len(jobs):
            _pass(loop, WindowPass(window, "learn"), stack, errors)


def _pass(
    loop: Loop,
    work: WindowPass,
    stack: Stack | None,
    errors: dict[int, str],
) -> None:
    """Evaluate or learn a window. What goes wrong in a training is an outcome; what fails in a
    stack's data fails all of it."""
    try:
        loop.run_passes([work], work.window)
    except Exception as error:
        for number in range(len(stack.jobs) if stack else 1):
            errors.setdefault(number, f"{type(error).__name__}: {error}")
    for number in stack.failed if stack else ():
        errors.setdefault(
            number, f"predictions of window {work.window} are NaN: the model has diverged"
        )


def _outcome(
    loop: Loop,
    name: str,
    window: int,
    number: int,
    errors: dict[int, str],
) -> Figures | str:
    if number not in errors:
        try:
            return figures_of(
                window, [state for key, state in loop.states.items() if key[0] == name]
            )
        except ValueError as error:
            errors[number] = str(error)
    return errors[number]


def figures_of(window: int, states: Iterable[MetricState]) -> Figures:
    """Figures of the tasks' summed states; ValueError where one is undefined or not finite."""
    states = list(states)
    told = [state.figures() for state in states]
    nes = [t["ne"] for t in told if t["ne"] is not None]
    calibrations = [t["calibration"] for t in told if t["calibration"] is not None]
    if not told or len(nes) < len(told) or len(calibrations) < len(told):
        raise ValueError(
            f"no examples, or labels of one kind only, up to window {window}: NE is undefined"
        )
    figures = Figures(
        window,
        sum(nes) / len(nes),
        max(calibrations, key=lambda c: abs(c - 1)),
        min(state.labels for state in states),
    )
    if not (math.isfinite(figures.ne) and math.isfinite(figures.calibration)):
        raise ValueError(
            f"NE {figures.ne} and calibration {figures.calibration} at window {window}: the model has diverged"
        )
    return figures
