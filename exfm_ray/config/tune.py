"""The `tune` section of the config: which settings a sweep searches, for which students and arms,
and which windows judge.

A setting is named as on the command line (`distillation.ah.w`). A space may hold the settings of
all arms: each arm searches those that bear on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from exfm_ray.base import FrozenModel, Name
from exfm_ray.config.arms import ALL_OBJECTIVES, LABELS, Arm, Objective
from exfm_ray.config.distillation import DistillationConfig

Value = bool | int | float | str | tuple[int, ...] | tuple[str, ...]
Settings = dict[str, Value]
"""Dotted setting -> value."""

BEARS: Mapping[str, Callable[[Arm], bool]] = {
    "distillation.kd.": lambda arm: arm.objective is Objective.KD,
    "distillation.ah.": lambda arm: arm.objective in (Objective.AH, Objective.AH_SA),
    "distillation.sa.": lambda arm: arm.objective is Objective.AH_SA,
    "distillation.share.": lambda arm: arm.shares_tables,
    "vm.optimizer.table_lr": lambda arm: not arm.shares_tables,
    "vm.": lambda arm: True,
}
"""Beginning of a setting's name -> the arms on which it bears; the first that fits counts."""

UNSEARCHABLE: Mapping[str, str] = {
    "distillation.history.": "the DAS represents the windows with it before the sweep begins, once for all trials; run a sweep for each value, "
    "under another name",
    "distillation.share.projection": "rows that fit are never projected, and rows of another width always have to be; set it in the config",
}
"""Beginning of a setting's name -> why no sweep can search it."""

STACKABLE = frozenset(
    {
        "vm.optimizer.table_lr",
        "vm.optimizer.dense_lr",
        "vm.optimizer.dense_weight_decay",
        "distillation.kd.w",
        "distillation.ah.w",
        "distillation.ah.alpha",
        "distillation.ah.beta",
        "distillation.sa.w",
        "distillation.sa.lr",
        "distillation.share.table_lr",
    }
)
"""Settings in which trials that learn together may differ. All others are structure: equal within a
block."""

RENAMED: Mapping[str, str] = {
    f"distillation.{section}.{old}": f"distillation.{section}.{new}"
    for section, field in DistillationConfig.model_fields.items()
    for old, new in getattr(field.annotation, "old_names", {}).items()
}
"""Former name of a searchable setting -> its name."""


def current_names(settings: object) -> object:
    """A mapping over dotted settings, each under the name that it has now."""
    if not isinstance(settings, Mapping):
        return settings
    return {RENAMED.get(setting, setting): value for setting, value in settings.items()}


POPULATION = 4
"""Fewest members of a population: a quarter of them is replaced."""


class Distribution(FrozenModel):
    """What one setting is drawn from: a range (`low`, `high`), or a list (`choice`)."""

    low: float | None = None
    high: float | None = None
    log: bool = Field(False, description="draw the logarithm evenly")
    integer: bool = False
    choice: tuple[Value, ...] = ()
    when: Annotated[dict[str, Value], BeforeValidator(current_names)] = Field(
        {},
        description="asked only where these settings of the space, named before it, have these values",
    )
    arms: tuple[Arm, ...] = Field(
        (), description="arms that search it; empty: those on which the setting bears"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        ends = (self.low, self.high)
        if self.choice:
            if ends != (None, None) or self.log or self.integer:
                raise ValueError("give low and high, or a choice, not both")
            if len({as_text(value) for value in self.choice}) < len(self.choice):
                raise ValueError("names a value twice")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give low and high, or a choice")
        if not self.low < self.high:
            raise ValueError(f"low is {self.low:g}, which is not below high = {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log is set with low = {self.low:g}; a logarithm needs low above 0")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(
                f"integer is set with ends {self.low:g} and {self.high:g}; give whole numbers"
            )
        return self

    def ends(self) -> tuple[Value, ...]:
        """Values that stand for all: the two ends of a range, every choice."""
        if self.choice:
            return self.choice
        assert self.low is not None and self.high is not None
        return (int(self.low), int(self.high)) if self.integer else (self.low, self.high)

    def match(self, value: Value) -> Value | None:
        """The value as the distribution holds it; None where it does not."""
        if self.choice:
            return next((choice for choice in self.choice if choice == value), None)
        low = self.low
        high = self.high
        assert low is not None and high is not None
        return value if isinstance(value, int | float) and low <= value <= high else None


def as_text(value: Value) -> str:
    """A choice's value as text: strings as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def default_space() -> dict[str, Distribution]:
    """Around the values that the configs here use. The adapter's settings are searched in ah_sa
    only, those of shared rows with +share."""
    return {
        "vm.optimizer.table_lr": Distribution(low=0.01, high=0.5, log=True),
        "vm.optimizer.dense_lr": Distribution(low=3e-4, high=2e-2, log=True),
        "distillation.kd.w": Distribution(low=0.05, high=4, log=True),
        "distillation.ah.w": Distribution(low=0.1, high=4, log=True),
        "distillation.ah.alpha": Distribution(low=0.5, high=2, log=True),
        "distillation.ah.beta": Distribution(low=0.25, high=16, log=True),
        "distillation.ah.mlp": Distribution(choice=((), (16,), (32,))),
        "distillation.sa.w": Distribution(low=0.1, high=4, log=True),
        "distillation.sa.mlp": Distribution(choice=((), (16,), (32, 16))),
        "distillation.sa.lr": Distribution(low=1e-4, high=3e-2, log=True),
        "distillation.sa.input": Distribution(choice=("probability", "logit")),
        "distillation.sa.separate_head": Distribution(choice=(False, True)),
        "distillation.share.mode": Distribution(choice=("replace", "average", "unseen")),
        "distillation.share.weight": Distribution(
            low=0.1, high=0.9, when={"distillation.share.mode": "average"}
        ),
        "distillation.share.min_uses": Distribution(
            low=1, high=10, integer=True, when={"distillation.share.mode": "unseen"}
        ),
        "distillation.share.optimizer": Distribution(choice=("keep", "reset", "teacher")),
        "distillation.share.table_lr": Distribution(low=0.001, high=0.1, log=True),
    }


class TuneConfig(FrozenModel):
    """A sweep: `trials` settings for each student and arm, scored on earlier windows, judged on
    later ones that no choice has seen."""

    old_names: ClassVar[Mapping[str, str]] = {
        "together": "trials_per_process",
        "concurrent": "max_concurrent",
        "score_windows": "validation_windows",
        "judge_windows": "holdout_windows",
    }

    students: tuple[Name, ...] = Field((), description="names of vm.models; empty: all of them")
    arms: tuple[Arm, ...] = ALL_OBJECTIVES
    trials: int = Field(
        32, ge=1, description="for each student and arm; the first one is the config as it stands"
    )
    trials_per_process: int = Field(
        1,
        ge=1,
        description="so many trials of one student and arm learn in one process, on the same batches",
    )
    seeds: int = Field(
        1,
        ge=1,
        description="trainings of a trial, with seed, seed + 1, ...; its figures are their means",
    )
    search: Literal["tpe", "random", "pbt"] = "tpe"
    early_stopping: Literal["asha", "none"] = "asha"
    validation_windows: tuple[int, int] = Field(
        description="first and last window whose NE scores a trial"
    )
    holdout_windows: tuple[int, int] = Field(
        description="first and last window on which the best ones are judged"
    )
    judge_seeds: int = Field(3, ge=1)
    calibration: tuple[float, float] = Field(
        (0.95, 1.05), description="a trial outside ranks behind all that are within"
    )
    max_concurrent: int = Field(2, ge=1, description="processes side by side, a logical CPU each")
    space: Annotated[dict[str, Distribution], BeforeValidator(current_names)] = Field(
        {}, description="setting -> distribution; empty: a space of sensible ranges"
    )

    @model_validator(mode="after")
    def _windows(self) -> Self:
        for setting, (first, last) in (
            ("validation_windows", self.validation_windows),
            ("holdout_windows", self.holdout_windows),
        ):
            if not 0 <= first <= last:
                raise ValueError(
                    f"tune.{setting} is [{first}, {last}]: give the first and the last window, in this order"
                )
        if self.holdout_windows[0] <= self.validation_windows[1]:
            raise ValueError(
                f"tune.holdout_windows begin at {self.holdout_windows[0]}, tune.validation_windows end at {self.validation_windows[1]}: "
                "what judges must lie after what chose; begin later"
            )
        if not 0 <= self.calibration[0] < 1 < self.calibration[1]:
            raise ValueError(
                f"tune.calibration is {list(self.calibration)}: give a bound below 1 and one above"
            )
        return self

    @model_validator(mode="after")
    def _arms(self) -> Self:
        if LABELS not in self.arms:
            raise ValueError("tune.arms leaves out labels, over which all gains are told; add it")
        for names, setting in ((self.arms, "arms"), (self.students, "students")):
            if len(set(names)) < len(names):
                raise ValueError(f"tune.{setting} names one twice")
        return self

    @model_validator(mode="after")
    def _conditions(self) -> Self:
        before: dict[str, Distribution] = {}
        for setting, distribution in self.space.items():
            for other, value in distribution.when.items():
                if other not in before:
                    raise ValueError(
                        f"tune.space '{setting}': when names '{other}', which the space does not name before it"
                    )
                if not before[other].choice:
                    raise ValueError(
                        f"tune.space '{setting}': when names '{other}', which is a range; only a choice can be a condition"
                    )
                if value not in before[other].choice:
                    raise ValueError(
                        f"tune.space '{setting}': when asks for {other} = {as_text(value)}, which is none of its choices"
                    )
                if self.trials_per_process > 1 and other in STACKABLE and setting not in STACKABLE:
                    raise ValueError(
                        f"tune.space '{setting}': when names '{other}', in which trials of one process differ, but '{setting}' must be equal "
                        "within it; set tune.trials_per_process to 1"
                    )
            before[setting] = distribution
        return self

    @model_validator(mode="after")
    def _differ(self) -> Self:
        for arm in self.arms if self.trials_per_process > 1 else ():
            space = self.space_of(arm)
            if space and not STACKABLE & set(space):
                raise ValueError(
                    f"tune.trials_per_process is {self.trials_per_process}: trials of arm {arm} would be alike within a process, for of what it searches "
                    f"({', '.join(space)}) nothing may differ there; set it to 1, or search {', '.join(sorted(STACKABLE))}"
                )
        return self

    @model_validator(mode="after")
    def _population(self) -> Self:
        if self.search != "pbt":
            return self
        if self.trials_per_process < POPULATION:
            raise ValueError(
                f"tune.trials_per_process is {self.trials_per_process}: search pbt makes it the size of a population; give at least {POPULATION}"
            )
        if self.trials % self.trials_per_process:
            raise ValueError(
                f"tune.trials is {self.trials}: search pbt trains whole populations; give a multiple of tune.trials_per_process = {self.trials_per_process}"
            )
        if self.early_stopping != "none":
            raise ValueError(
                f"tune.early_stopping is {self.early_stopping}: search pbt replaces poor trials itself; set it to none"
            )
        if self.seeds > 1:
            raise ValueError(
                f"tune.seeds is {self.seeds}: search pbt copies one training to another; set it to 1"
            )
        if self.validation_windows[0] == self.validation_windows[1]:
            raise ValueError(
                "tune.validation_windows holds one window: search pbt replaces trials between two; give more windows"
            )
        return self

    def space_of(self, arm: str) -> dict[str, Distribution]:
        """The settings that an arm searches."""
        space = self.space or default_space()
        known = Arm(arm)
        return {
            name: d
            for name, d in space.items()
            if (known in d.arms if d.arms else _bears(name, known))
        }


def _bears(setting: str, arm: Arm) -> bool:
    return next((bears(arm) for start, bears in BEARS.items() if setting.startswith(start)), False)
