"""What the ablation study trains: arms, single knobs, controls, older teachers, other FMs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.config.tune import Settings
from studies.ablation.teachers import Column, supervised
from tuning.rows import StudentRows
from tuning.trial import Figures, learn, trial_job

LAGS = (1, 2, 4, 8)
MOST_TOGETHER = 16
"""Largest number of trainings in one call of `learn`."""

NEUTRAL: Settings = {
    "distillation.ah.w": 1.0,
    "distillation.ah.alpha": 1.0,
    "distillation.ah.beta": 1.0,
    "distillation.ah.mlp": (),
}
KNOBS: dict[str, tuple[Settings, ...]] = {
    "w": ({"distillation.ah.w": 0.25}, {"distillation.ah.w": 4.0}),
    "alpha": ({"distillation.ah.alpha": 0.8}, {"distillation.ah.alpha": 1.25}),
    "beta": ({"distillation.ah.beta": 0.25}, {"distillation.ah.beta": 4.0}),
    "mlp": ({"distillation.ah.mlp": (32,)},),
}
CONTROLS = {
    "shuffled": "shuffled teacher",
    "constant": "constant teacher",
    "student_sized": "student-sized teacher",
    "own_label": "own label",
}
OTHER_FMS = {"small": "small FM", "large": "large FM", "one_domain": "FM of its domain only"}


class Variant(NamedTuple):
    """One way to train a student.

    Attributes:
        family: group of variants in tables and drawings.
        name: unique among all variants.
        settings: dotted setting -> value; they replace those of the config.
        teacher: name of the teacher from whose predictions it learns; None without a teacher.
        first: the first window with supervision; rows before it are learned from labels alone.
        against: the variant from which it differs in one thing; None: labels.
    """

    family: str
    name: str
    arm: str
    settings: Settings
    teacher: str | None
    first: int
    against: str | None


def variants(windows: int) -> list[Variant]:
    """Return all variants for a stream of `windows` windows, labels first.

    Lags whose supervision no evaluation could show are left out.
    """
    return [
        Variant("arms", "labels", "labels", {}, None, windows, None),
        Variant("arms", "kd", "kd", {}, "lag 1", 1, None),
        Variant("arms", "ah", "ah", {}, "lag 1", 1, None),
        Variant("arms", "ah_sa", "ah_sa", {}, "lag 1", 1, "ah"),
        *_single_knobs(),
        *_controls(),
        *_staleness(windows),
        *_other_fms(),
    ]


def _single_knobs() -> Iterator[Variant]:
    family = "knobs alone"
    reference = "neutral ah"
    yield Variant(family, reference, "ah", NEUTRAL, "lag 1", 1, None)
    for knob, changes in KNOBS.items():
        for change in changes:
            (value,) = change.values()
            name = f"neutral, {knob} {_text(value)}"
            yield Variant(family, name, "ah", {**NEUTRAL, **change}, "lag 1", 1, reference)


def _controls() -> Iterator[Variant]:
    for arm in ("kd", "ah"):
        for teacher, title in CONTROLS.items():
            if (arm, teacher) != ("kd", "own_label"):  # that would only multiply the loss
                yield Variant("controls", f"{arm}, {title}", arm, {}, teacher, 1, arm)


def _staleness(windows: int) -> Iterator[Variant]:
    visible_lags = [lag for lag in LAGS if 1 < lag < windows - 1]
    for arm in ("ah", "ah_sa"):
        for lag in visible_lags:
            fresh = f"{arm}, lag 1 from window {lag} on"
            yield Variant("staleness", f"{arm}, lag {lag}", arm, {}, f"lag {lag}", lag, fresh)
            yield Variant("staleness", fresh, arm, {}, "lag 1", lag, arm)


def _other_fms() -> Iterator[Variant]:
    for arm in ("ah", "ah_sa"):
        for teacher, title in OTHER_FMS.items():
            yield Variant("other FMs", f"{arm}, {title}", arm, {}, teacher, 1, arm)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(list(value)) if isinstance(value, tuple) else str(value)


class Training(NamedTuple):
    """One variant with one seed."""

    variant: Variant
    seed: int


def calls(
    config: Config,
    all_variants: Sequence[Variant],
    seeds: Sequence[int],
) -> list[list[Training]]:
    """Divide the trainings into calls of `learn`.

    The trainings of a call have the same arm and structure, and supervision in the same windows.
    """
    by_structure: dict[tuple[object, ...], list[Training]] = defaultdict(list)
    for variant in all_variants:
        mlp = variant.settings.get("distillation.ah.mlp", config.distillation.ah.mlp)
        structure = (variant.arm, mlp, variant.first)
        by_structure[structure] += [Training(variant, seed) for seed in seeds]

    all_calls = []
    for trainings in by_structure.values():
        parts = -(-len(trainings) // MOST_TOGETHER)
        all_calls += [trainings[part::parts] for part in range(parts)]
    return all_calls


def train(
    config: Config,
    student: StudentConfig,
    trainings: Sequence[Training],
    rows: StudentRows,
    columns: Sequence[Column],
    holdout: tuple[int, int],
) -> list[Figures | str]:
    """Train one call and return the figures, or the error, of each training.

    Args:
        rows: the student's rows with the predictions of all teachers.
        columns: seed and teacher of each column of predictions.
        holdout: first and last window of the figures.
    """
    first, last = holdout
    jobs = []
    chosen = []
    for variant, seed in trainings:
        jobs.append(trial_job(config, student, variant.arm, variant.settings, first, seed))
        if variant.teacher is not None:
            chosen.append(columns.index((seed, variant.teacher)))
    reader = supervised(rows, chosen, trainings[0].variant.first)
    teacher_of_job = list(range(len(chosen))) or None
    *_, outcomes = learn(jobs, reader, range(last + 1), teacher_of_job)
    return [outcome if outcome is not None else "no figures" for outcome in outcomes]
