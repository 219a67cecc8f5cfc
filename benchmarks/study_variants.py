"""What the study trains: the arms of the config, knobs alone, controls, older teachers, FMs of
other sizes, one domain's FM."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.study_teachers import Column, supervised
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.config.tune import Settings
from tuning.rows import StudentRows
from tuning.trial import Figures, learn, trial_job

LAGS = (1, 2, 4, 8)
MOST_TOGETHER = 16
"""Trainings in one call of `learn`."""

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
        settings: over the config's.
        teacher: whose predictions it learns; None: nobody's.
        first: the first window with supervision; before it rows are learnt from labels alone.
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
    """All variants for a stream of so many windows, labels first; lags whose supervision no
    evaluation could show are left out."""
    found = [Variant("arms", "labels", "labels", {}, None, windows, None)]
    found += [
        Variant("arms", arm, arm, {}, "lag 1", 1, "ah" if arm == "ah_sa" else None)
        for arm in ("kd", "ah", "ah_sa")
    ]
    found += [Variant("knobs alone", "neutral ah", "ah", NEUTRAL, "lag 1", 1, None)]
    for knob, values in KNOBS.items():
        for value in values:
            (shown,) = value.values()
            found.append(
                Variant(
                    "knobs alone",
                    f"neutral, {knob} {_text(shown)}",
                    "ah",
                    {**NEUTRAL, **value},
                    "lag 1",
                    1,
                    "neutral ah",
                )
            )
    for arm in ("kd", "ah"):
        for teacher, title in CONTROLS.items():
            if (arm, teacher) != ("kd", "own_label"):  # that would only multiply the loss
                found.append(Variant("controls", f"{arm}, {title}", arm, {}, teacher, 1, arm))
    for arm in ("ah", "ah_sa"):
        for lag in (lag for lag in LAGS if 1 < lag < windows - 1):
            fresh = f"{arm}, lag 1 from window {lag} on"
            found.append(
                Variant("staleness", f"{arm}, lag {lag}", arm, {}, f"lag {lag}", lag, fresh)
            )
            found.append(Variant("staleness", fresh, arm, {}, "lag 1", lag, arm))
    for arm in ("ah", "ah_sa"):
        found += [
            Variant("other FMs", f"{arm}, {title}", arm, {}, teacher, 1, arm)
            for teacher, title in OTHER_FMS.items()
        ]
    return found


def _text(value: object) -> str:
    return (
        f"{value:g}"
        if isinstance(value, float)
        else str(list(value))
        if isinstance(value, tuple)
        else str(value)
    )


class Training(NamedTuple):
    """One variant with one seed."""

    variant: Variant
    seed: int


def calls(
    config: Config,
    wanted: Sequence[Variant],
    seeds: Sequence[int],
) -> list[list[Training]]:
    """Trainings that one call of `learn` takes together: of one arm and structure, with supervision
    in the same windows."""
    alike: dict[tuple[object, ...], list[Training]] = defaultdict(list)
    for variant in wanted:
        widths = tuple(variant.settings.get("distillation.ah.mlp", config.distillation.ah.mlp))  # type: ignore[arg-type]
        alike[variant.arm, widths, variant.first] += [Training(variant, seed) for seed in seeds]
    found = []
    for together in alike.values():
        parts = -(-len(together) // MOST_TOGETHER)
        found += [together[part::parts] for part in range(parts)]
    return found


def train(
    config: Config,
    student: StudentConfig,
    trainings: Sequence[Training],
    rows: StudentRows,
    columns: Sequence[Column],
    judged: tuple[int, int],
) -> list[Figures | str]:
    """Figures of one call's trainings over the judged windows together; what went wrong, where one
    has failed."""
    jobs = [
        trial_job(config, student, t.variant.arm, t.variant.settings, judged[0], t.seed)
        for t in trainings
    ]
    chosen = [
        columns.index((t.seed, t.variant.teacher))
        for t in trainings
        if t.variant.teacher is not None
    ]
    reader = supervised(rows, chosen, trainings[0].variant.first)
    *_, last = learn(jobs, reader, range(judged[1] + 1), list(range(len(chosen))) or None)
    return [outcome if outcome is not None else "no figures" for outcome in last]
