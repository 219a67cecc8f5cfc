"""Checks that need the whole config."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exfm_ray.config.root import Config

from collections.abc import Mapping

from pydantic import ValidationError

from exfm_ray.config.explain import explain
from exfm_ray.config.trainer import OptimizerConfig
from exfm_ray.config.tree import set_dotted
from exfm_ray.config.tune import UNSEARCHABLE, TuneConfig, as_text
from exfm_ray.errors import nearest


def with_settings(config: Config, settings: Mapping[str, object]) -> Config:
    """The config with other values of dotted settings and without its `tune` section;
    ValidationError for values that do not fit."""
    tree = config.model_dump(mode="json", exclude={"tune"})
    for setting, value in settings.items():
        set_dotted(tree, setting, value)
    return type(config).model_validate(tree)


def check_sweep(config: Config, tune: TuneConfig) -> None:
    """ValueError for students and settings that are not there, and for values of a space that no
    config may have."""
    students = [student.name for student in config.vm.models]
    for name in tune.students:
        if name not in students:
            raise ValueError(
                f"tune.students names '{name}', which is none of vm.models.{nearest(name, students)}"
            )
    known = [
        f"distillation.{part}.{key}"
        for part, section in config.distillation
        for key in type(section).model_fields
    ]
    searchable = [
        setting
        for setting in known
        if not any(setting.startswith(beginning) for beginning in UNSEARCHABLE)
    ]
    searchable += [f"vm.optimizer.{key}" for key in OptimizerConfig.model_fields] + [
        "vm.batch_size"
    ]
    for setting, distribution in tune.space.items():
        why = (
            next(
                (why for beginning, why in UNSEARCHABLE.items() if setting.startswith(beginning)),
                None,
            )
            if setting in known
            else None
        )
        if why:
            raise ValueError(f"tune.space: '{setting}' cannot be searched: {why}")
        if setting not in searchable:
            told = nearest(setting, searchable) or f" A sweep may search {', '.join(searchable)}."
            raise ValueError(f"tune.space: unknown setting '{setting}'.{told}")
        for value in distribution.ends():
            try:
                with_settings(config, {setting: value})
            except ValidationError as error:
                raise ValueError(
                    "tune.space: " + "; ".join(explain(e, type(config)) for e in error.errors())
                ) from None
    given = config.distillation.share.tables
    for tables in (
        tune.space["distillation.share.tables"].choice
        if given and "distillation.share.tables" in tune.space
        else ()
    ):
        if not tables or not set(tables) <= set(given):  # type: ignore[arg-type]
            raise ValueError(
                f"tune.space: 'distillation.share.tables' asks for {as_text(tables)}, but before the sweep begins the DAS gives rows of "
                f"{as_text(given)} alone, as distillation.share.tables says; set that to [], all tables"
            )
