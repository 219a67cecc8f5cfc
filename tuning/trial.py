"""One trial: a student learns by one arm under given settings, window by window, and says after each how good it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from exfm_ray.config import Config, StudentConfig, with_settings
from exfm_ray.data.feed import FragmentReader, Pass
from exfm_ray.metrics.state import MetricState
from exfm_ray.training.job import Job
from exfm_ray.training.local import local_loop
from exfm_ray.tune_config import Settings

OUTSIDE = 1.0
"""What leaving the bounds of calibration costs at once: more than any difference in NE between models worth comparing."""


class Figures(NamedTuple):
    """How good a student is over the windows counted so far, up to `window`: means over its tasks, calibration the worst one's."""

    window: int
    ne: float
    calibration: float


def score(figures: Figures, bounds: tuple[float, float]) -> float:
    """NE, where calibration lies within `bounds`; else NE + `OUTSIDE` + the distance to the nearer bound. Lower is better.

    So a trial outside ranks behind all that are within, and the further outside the further behind.
    """
    distance = max(bounds[0] - figures.calibration, figures.calibration - bounds[1], 0.0)
    return figures.ne + (OUTSIDE + distance if distance else 0.0)


def trial_job(config: Config, student: StudentConfig, arm: str, settings: Settings, count_from: int, seed: int | None = None) -> Job:
    """The job of one trial: this student, this arm, one process. Figures are summed from window `count_from` on."""
    fixed = {
        "vm.models": [student.model_dump(mode="json")], "vm.arms": [arm], "vm.workers": 1, "metrics.warmup_windows": count_from,
        "seed": config.seed if seed is None else seed,
    }  # fmt: skip
    return Job("trial", with_settings(config, {**fixed, **settings}), (student,))


def learn(job: Job, reader: FragmentReader, windows: Sequence[int]) -> Iterator[tuple[Figures | None, list[dict[str, Any]]]]:
    """Train over `windows`. Yields after the evaluation of each the figures so far (None before the first counted one) and the window's
    rows of metrics.jsonl. A window is learnt when the next one is asked for; the last one never, for nothing is evaluated after it.

    ValueError where figures are undefined or infinite: no examples, no labels, a model that has diverged.
    """
    torch.set_num_threads(job.trainer.threads or 1)
    loop, _ = local_loop(job, windows, reader)
    for window in windows:
        rows = loop.run_passes([Pass(window, "evaluate")], window)
        counted = window >= job.config.metrics.warmup_windows
        yield figures_of(window, loop.states.values()) if counted else None, rows
        if window != windows[-1]:
            loop.run_passes([Pass(window, "learn")], window)


def figures_of(window: int, states: Iterable[MetricState]) -> Figures:
    """Figures of the tasks' summed states; ValueError where one is undefined or not finite."""
    told = [state.figures() for state in states]
    nes, calibrations = [t["ne"] for t in told if t["ne"] is not None], [t["calibration"] for t in told if t["calibration"] is not None]
    if not told or len(nes) < len(told) or len(calibrations) < len(told):
        raise ValueError(f"no examples, or labels of one kind only, up to window {window}: NE is undefined")
    figures = Figures(window, sum(nes) / len(nes), max(calibrations, key=lambda c: abs(c - 1)))
    if not (math.isfinite(figures.ne) and math.isfinite(figures.calibration)):
        raise ValueError(f"NE {figures.ne} and calibration {figures.calibration} at window {window}: the model has diverged")
    return figures
