"""Checks that need the whole config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from pydantic import ValidationError

from exfm_ray.config.explain import explain
from exfm_ray.config.sections import Sections
from exfm_ray.config.trainer import OptimizerConfig, StudentConfig
from exfm_ray.config.tree import set_dotted
from exfm_ray.config.tune import UNSEARCHABLE, Distribution, TuneConfig, as_text
from exfm_ray.errors import nearest

C = TypeVar("C", bound=Sections)

SHARED_TABLES = "distillation.share.tables"


def with_settings(config: C, settings: Mapping[str, object]) -> C:
    """Return the config with other values of dotted settings, and without its `tune` section.

    Raises:
        ValidationError: a value is not allowed.
    """
    tree = config.model_dump(
        mode="json",
        exclude={"tune"},
    )
    for setting, value in settings.items():
        set_dotted(tree, setting, value)
    config_class = type(config)
    return config_class.model_validate(tree)


def check_sweep(config: Sections, tune: TuneConfig) -> None:
    """Check the students, settings and values of a sweep against the config.

    Raises:
        ValueError: a student or setting does not exist, or no config may have one of the values.
    """
    students = [student.name for student in config.vm.models]
    for name in tune.students:
        if name not in students:
            hint = nearest(name, students)
            raise ValueError(f"tune.students names '{name}', which is not in vm.models.{hint}")

    for setting, distribution in tune.space.items():
        _check_searchable(config, setting)
        _check_values(config, setting, distribution)
    published = config.distillation.share.tables
    searched = tune.space.get(SHARED_TABLES)
    _check_shared_tables(published, searched)


def _check_searchable(config: Sections, setting: str) -> None:
    """Refuse a setting that does not exist or that no sweep can search."""
    known = _distillation_settings(config)
    reason = _why_unsearchable(setting)
    if reason and setting in known:
        raise ValueError(f"tune.space: '{setting}' cannot be searched: {reason}")

    searchable = _searchable_settings(known)
    if setting not in searchable:
        listed = f" A sweep may search {', '.join(searchable)}."
        hint = nearest(setting, searchable) or listed
        raise ValueError(f"tune.space: unknown setting '{setting}'.{hint}")


def _searchable_settings(distillation: Sequence[str]) -> list[str]:
    searchable = []
    for name in distillation:
        if not _why_unsearchable(name):
            searchable.append(name)
    for key in OptimizerConfig.model_fields:
        searchable.append(f"vm.optimizer.{key}")
    searchable.append("vm.batch_size")
    return searchable


def _distillation_settings(config: Sections) -> list[str]:
    settings = []
    for name, section in config.distillation:
        section_class = type(section)
        for key in section_class.model_fields:
            settings.append(f"distillation.{name}.{key}")
    return settings


def _why_unsearchable(setting: str) -> str | None:
    for prefix, reason in UNSEARCHABLE.items():
        if setting.startswith(prefix):
            return reason
    return None


def _check_values(
    config: Sections,
    setting: str,
    distribution: Distribution,
) -> None:
    """Refuse a distribution with values that no config may have."""
    for value in distribution.ends():
        try:
            with_settings(config, {setting: value})
        except ValidationError as error:
            mistakes = "; ".join(explain(mistake, type(config)) for mistake in error.errors())
            raise ValueError(f"tune.space: {mistakes}") from None


def _check_shared_tables(published: Sequence[str], searched: Distribution | None) -> None:
    """Refuse to search tables whose rows the DAS does not publish; an empty list is all tables."""
    if not published or searched is None:
        return
    for tables in searched.choice:
        if not tables or not set(tables) <= set(published):  # type: ignore[arg-type]
            raise ValueError(
                f"tune.space: '{SHARED_TABLES}' has the choice {as_text(tables)}, but before the "
                f"sweep begins the DAS publishes only rows of {as_text(tuple(published))}, as set "
                f"in {SHARED_TABLES}; set that to [], all tables"
            )


def check_teachers(config: Sections) -> None:
    """Check who teaches whom.

    Raises:
        ValueError: two teachers have one name, a teacher does not exist, a vertical model cannot
            publish its arm, or a vertical model would learn from itself.
    """
    publishing = {
        student.name: student for student in config.vm.models if student.published_arm is not None
    }
    names = [config.fm.name, *(teacher.name for teacher in config.teachers)]
    _check_names(config, names, publishing)

    for student in config.vm.models:
        if student.teacher and student.teacher not in names:
            raise ValueError(
                f"vertical model '{student.name}': teacher '{student.teacher}' is not one of "
                f"{', '.join(names)}."
            )
        _check_published_arm(config, student)
        _check_acyclic(config, student, publishing)


def _check_names(
    config: Sections,
    names: Sequence[str],
    publishing: Mapping[str, StudentConfig],
) -> None:
    """Refuse two teachers of one name, and teachers that do not exist."""
    for teacher in config.teachers:
        if names.count(teacher.name) > 1:
            raise ValueError(
                f"two teachers are named '{teacher.name}' (the FM is '{config.fm.name}')"
            )
        if teacher.run is None and teacher.name not in publishing:
            raise ValueError(
                f"teacher '{teacher.name}' has no `run`, and no vertical model of this name has a "
                "`published_arm`"
            )


def _check_published_arm(config: Sections, student: StudentConfig) -> None:
    arm = student.published_arm
    if arm is None:
        return
    if arm not in config.vm.arms:
        raise ValueError(
            f"vertical model '{student.name}' publishes arm '{arm}', which is not in vm.arms"
        )
    if arm.uses_history:
        raise ValueError(
            f"vertical model '{student.name}' publishes arm '{arm}', whose predictions need each "
            "user's history, which the DAS does not look up when it scores; publish an arm without "
            "+history"
        )
    if student.name == config.fm.name:
        raise ValueError(
            f"vertical model '{student.name}' publishes under the FM's name; rename one of them"
        )


def _check_acyclic(
    config: Sections,
    student: StudentConfig,
    publishing: Mapping[str, StudentConfig],
) -> None:
    """Follow the teachers of a student upward and refuse a cycle."""
    of_other_runs = {teacher.name for teacher in config.teachers if teacher.run}
    chain = [student.name]
    teacher = student.teacher
    while teacher is not None and teacher in publishing and teacher not in of_other_runs:
        chain.append(teacher)
        if teacher in chain[:-1]:
            raise ValueError(
                f"vertical model '{student.name}' would learn from itself: {' <- '.join(chain)}"
            )
        teacher = publishing[teacher].teacher
