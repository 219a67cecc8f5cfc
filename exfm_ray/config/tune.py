"""The `tune` section of the config: which settings a sweep searches, for which students and arms.

A setting is named as on the command line (`distillation.ah.w`). A space may hold the settings of
all arms: each arm searches those that affect it.
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

AFFECTED_ARMS: Mapping[str, Callable[[Arm], bool]] = {
    "distillation.kd.": lambda arm: arm.objective is Objective.KD,
    "distillation.ah.": lambda arm: arm.objective in (Objective.AH, Objective.AH_SA),
    "distillation.sa.": lambda arm: arm.objective is Objective.AH_SA,
    "distillation.share.": lambda arm: arm.shares_tables,
    "vm.optimizer.table_lr": lambda arm: not arm.shares_tables,
    "vm.": lambda arm: True,
}
"""Prefix of a setting's name -> the arms that the setting affects. The first match counts."""

UNSEARCHABLE: Mapping[str, str] = {
    "distillation.history.": "the DAS computes the history once for all trials, before the sweep "
    "begins; run one sweep per value, each under its own name",
    "distillation.share.projection": "rows of the same width are never projected, and rows of "
    "another width always are; set it in the config",
}
"""Prefix of a setting's name -> why no sweep can search it."""

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
"""Settings that may differ between trials of one process.

All others are structure: they must be equal within a group of trials that learn together.
"""

RENAMED: Mapping[str, str] = {
    f"distillation.{section}.{old}": f"distillation.{section}.{new}"
    for section, field in DistillationConfig.model_fields.items()
    for old, new in getattr(field.annotation, "old_names", {}).items()
}
"""Former name of a searchable setting -> its name."""

MIN_POPULATION = 4
"""Smallest population of `search: pbt`, which replaces a quarter of it at a time."""


def current_names(settings: object) -> object:
    """Return a mapping over dotted settings with former names replaced by current ones."""
    if not isinstance(settings, Mapping):
        return settings

    renamed = {}
    for setting, value in settings.items():
        name = RENAMED.get(setting, setting)
        renamed[name] = value
    return renamed


def as_text(value: Value) -> str:
    """Return a value as text: strings as they are, everything else as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value)


class Distribution(FrozenModel):
    """What one setting is drawn from: a range (`low`, `high`), or a list (`choice`)."""

    low: float | None = Field(None, description="Lower end of a range.")
    high: float | None = Field(None, description="Upper end of a range.")
    log: bool = Field(False, description="Draw uniformly on a logarithmic scale.")
    integer: bool = Field(False, description="Draw whole numbers.")
    choice: tuple[Value, ...] = Field((), description="Values to choose from, instead of a range.")
    when: Annotated[dict[str, Value], BeforeValidator(current_names)] = Field(
        {},
        description="Setting -> value: search this setting only if these settings of the space, "
        "listed before it, have these values.",
    )
    arms: tuple[Arm, ...] = Field(
        (), description="Arms that search this setting; empty: all arms that it affects."
    )

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.choice:
            self._check_choice()
        else:
            self._check_range()
        return self

    def _check_choice(self) -> None:
        ends = (self.low, self.high)
        has_range_settings = ends != (None, None) or self.log or self.integer
        if has_range_settings:
            raise ValueError("set low and high, or a choice, not both")
        distinct = {as_text(value) for value in self.choice}
        if len(distinct) < len(self.choice):
            raise ValueError("names a value twice")

    def _check_range(self) -> None:
        if self.low is None or self.high is None:
            raise ValueError("set low and high, or a choice")
        if not self.low < self.high:
            raise ValueError(f"low is {self.low:g}, which is not below high = {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log is set with low = {self.low:g}; a logarithm needs low above 0")
        whole_ends = self.low.is_integer() and self.high.is_integer()
        if self.integer and not whole_ends:
            raise ValueError(
                f"integer is set with ends {self.low:g} and {self.high:g}; set whole numbers"
            )

    def ends(self) -> tuple[Value, ...]:
        """Return values that represent all others: the ends of a range, or every choice."""
        if self.choice:
            return self.choice
        low = self.low
        high = self.high
        assert low is not None and high is not None
        if self.integer:
            return int(low), int(high)
        return low, high

    def match(self, value: Value) -> Value | None:
        """Return the value in the distribution's own form, or None if it is outside."""
        for choice in self.choice:
            if choice == value:
                return choice
        if self.choice or not isinstance(value, int | float):
            return None

        low = self.low
        high = self.high
        assert low is not None and high is not None
        if low <= value <= high:
            return value
        return None


def default_space() -> dict[str, Distribution]:
    """Return ranges around the values of the ready configs.

    Settings of the adapter affect ah_sa only, and those of shared rows arms with +share.
    """
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
    """A sweep: `trials` settings for each student and arm.

    Earlier windows score the trials. The best ones are trained again and judged on later windows,
    which no choice has seen.
    """

    old_names: ClassVar[Mapping[str, str]] = {
        "together": "trials_per_process",
        "concurrent": "max_concurrent",
        "score_windows": "validation_windows",
        "judge_windows": "holdout_windows",
    }

    students: tuple[Name, ...] = Field(
        (), description="Names of vertical models in vm.models; empty: all of them."
    )
    arms: tuple[Arm, ...] = Field(
        ALL_OBJECTIVES, description="Arms to search. `labels`, the baseline, must be among them."
    )
    trials: int = Field(
        32,
        ge=1,
        description="Trials for each student and arm. The first one has the config's own settings.",
    )
    trials_per_process: int = Field(
        1,
        ge=1,
        description="Trials of one student and arm that learn in one process, on the same batches.",
    )
    seeds: int = Field(
        1,
        ge=1,
        description="Trainings of a trial, with seed, seed + 1, and so on. Its metrics are their "
        "means.",
    )
    search: Literal["tpe", "random", "pbt"] = Field(
        "tpe",
        description="tpe: tree-structured Parzen estimator; random: random search; pbt: "
        "population-based training.",
    )
    early_stopping: Literal["asha", "none"] = Field(
        "asha",
        description="asha: stop the worse half after 1, 2, 4, ... validation windows; none: train "
        "every trial to the end.",
    )
    validation_windows: tuple[int, int] = Field(
        description="First and last window whose NE scores a trial."
    )
    holdout_windows: tuple[int, int] = Field(
        description="First and last window on which the best trials are judged."
    )
    judge_seeds: int = Field(
        3, ge=1, description="Trainings of each judged setting, with seed, seed + 1, and so on."
    )
    calibration: tuple[float, float] = Field(
        (0.95, 1.05),
        description="Bounds of the calibration. A trial outside ranks behind all trials inside.",
    )
    max_concurrent: int = Field(
        2, ge=1, description="Processes that run side by side, with one logical CPU each."
    )
    space: Annotated[dict[str, Distribution], BeforeValidator(current_names)] = Field(
        {}, description="Setting -> distribution; empty: a space of sensible ranges."
    )

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        windows = {
            "validation_windows": self.validation_windows,
            "holdout_windows": self.holdout_windows,
        }
        for setting, (first, last) in windows.items():
            if not 0 <= first <= last:
                raise ValueError(
                    f"tune.{setting} is [{first}, {last}]: set the first and the last window, in "
                    "this order"
                )
        if self.holdout_windows[0] <= self.validation_windows[1]:
            raise ValueError(
                f"tune.holdout_windows begin at {self.holdout_windows[0]}, but "
                f"tune.validation_windows end at {self.validation_windows[1]}: holdout windows "
                "must be later than all validation windows; begin later"
            )
        return self

    @model_validator(mode="after")
    def _check_calibration(self) -> Self:
        low, high = self.calibration
        if not 0 <= low < 1 < high:
            raise ValueError(
                f"tune.calibration is {[low, high]}: set one bound below 1 and one above"
            )
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if LABELS not in self.arms:
            raise ValueError("tune.arms does not contain labels, the baseline of all gains; add it")
        lists = {"arms": self.arms, "students": self.students}
        for setting, names in lists.items():
            distinct = set(names)
            if len(distinct) < len(names):
                raise ValueError(f"tune.{setting} contains a name twice")
        return self

    @model_validator(mode="after")
    def _check_conditions(self) -> Self:
        listed_before: dict[str, Distribution] = {}
        for setting, distribution in self.space.items():
            for condition, value in distribution.when.items():
                problem = self._wrong_condition(
                    setting,
                    condition,
                    value,
                    listed_before,
                )
                if problem:
                    raise ValueError(f"tune.space '{setting}': {problem}")
            listed_before[setting] = distribution
        return self

    def _wrong_condition(
        self,
        setting: str,
        condition: str,
        value: Value,
        listed_before: Mapping[str, Distribution],
    ) -> str | None:
        """Return what is wrong with a `when` of a setting, or None."""
        if condition not in listed_before:
            return f"when names '{condition}', which the space does not list before it"
        choices = listed_before[condition].choice
        if not choices:
            return f"when names '{condition}', which is a range; only a choice can be a condition"
        if value not in choices:
            return f"when requires {condition} = {as_text(value)}, which is not one of its choices"
        if self.trials_per_process > 1 and condition in STACKABLE and setting not in STACKABLE:
            return (
                f"when names '{condition}', which may differ between trials of one process, but "
                f"'{setting}' must be equal for all of them; set tune.trials_per_process to 1"
            )
        return None

    @model_validator(mode="after")
    def _check_groups_differ(self) -> Self:
        if self.trials_per_process == 1:
            return self
        for arm in self.arms:
            space = self.space_of(arm)
            if space and not STACKABLE & set(space):
                raise ValueError(
                    f"tune.trials_per_process is {self.trials_per_process}, but every setting "
                    f"searched for arm {arm} ({', '.join(space)}) must be equal within a process, "
                    "so its trials would be identical. Set tune.trials_per_process to 1, or search "
                    f"one of: {', '.join(sorted(STACKABLE))}"
                )
        return self

    @model_validator(mode="after")
    def _check_population(self) -> Self:
        if self.search != "pbt":
            return self
        if self.trials_per_process < MIN_POPULATION:
            raise ValueError(
                f"tune.trials_per_process is {self.trials_per_process}: it is the size of a "
                f"population in search pbt; set it to at least {MIN_POPULATION}"
            )
        if self.trials % self.trials_per_process:
            raise ValueError(
                f"tune.trials is {self.trials}: search pbt trains whole populations; set a "
                f"multiple of tune.trials_per_process = {self.trials_per_process}"
            )
        if self.early_stopping != "none":
            raise ValueError(
                f"tune.early_stopping is {self.early_stopping}: search pbt replaces poor trials "
                "itself; set it to none"
            )
        if self.seeds > 1:
            raise ValueError(
                f"tune.seeds is {self.seeds}: search pbt copies one training to another; set it to "
                "1"
            )
        if self.validation_windows[0] == self.validation_windows[1]:
            raise ValueError(
                "tune.validation_windows holds one window: search pbt replaces trials between two; "
                "set more windows"
            )
        return self

    def space_of(self, arm: str) -> dict[str, Distribution]:
        """Return the settings that an arm searches."""
        space = self.space or default_space()
        searching = Arm(arm)
        return {
            setting: distribution
            for setting, distribution in space.items()
            if _searches(searching, setting, distribution)
        }


def _searches(
    arm: Arm,
    setting: str,
    distribution: Distribution,
) -> bool:
    if distribution.arms:
        return arm in distribution.arms
    for prefix, affects in AFFECTED_ARMS.items():
        if setting.startswith(prefix):
            return affects(arm)
    return False
