"""The reference of all settings, docs/configuration.md, made from their descriptions.

`python -m exfm_ray.config.reference > docs/configuration.md` writes it.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from exfm_ray.base import FrozenModel
from exfm_ray.config.arms import Arm
from exfm_ray.config.models import BackboneConfig
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import FMConfig

INTRODUCTION = """\
# Configuration

<!-- Made by `python -m exfm_ray.config.reference > docs/configuration.md`. Do not edit. -->

A run is configured by one YAML file, `--config FILE`. `--set section.key=value` overrides a
setting, with its value in YAML. Unknown settings are errors. Ready files are in `configs/`; their
names alone work, too: `--config demo`. In Python, `exfm_ray.load_config` reads a config.

`[]` in a section's name stands for an item of a list, `<name>` for a key of your choice. Types:
`[integer, ...]` is a list, `{name: integer}` a mapping. Former names of settings stay valid.
"""
MODEL_SECTION = "`fm.model`, `vm.model`, `vm.models[].model`"
MAX_ALTERNATIVES = 3
"""A type with more alternatives is described as `value`."""
MODEL_INTRODUCTION = """\
The interaction model of the FM or of a vertical model. `type` selects one of the models below; a
type `my_module:MyModel` is a model of your own, see [models.md](models.md). All models have these
settings:
"""
BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
PLAIN_TYPES: Mapping[object, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    Arm: "arm",
    type(None): "null",
    Ellipsis: "...",
}


@dataclass(frozen=True)
class Setting:
    """A setting of a section.

    Attributes:
        name: its key in YAML.
        type: allowed values, in words.
        default: in YAML; "required" if the setting has none.
        description: what it does, and its former names.
    """

    name: str
    type: str
    default: str
    description: str

    def row(self) -> str:
        """Return the row of a Markdown table."""
        cells = (
            f"`{self.name}`",
            self.type,
            self.default,
            self.description,
        )
        escaped = [cell.replace("|", "\\|") for cell in cells]
        row = " | ".join(escaped)
        return f"| {row} |"


@dataclass(frozen=True)
class Section:
    """A section of the config tree.

    Attributes:
        path: its dotted name; empty for the root.
        config: the class that describes it.
        notes: what its parent says about it.
    """

    path: str
    config: type[FrozenModel]
    notes: str = ""

    def settings(self) -> list[Setting]:
        """Return the settings of the section, without its subsections."""
        settings = []
        for name, field in self.config.model_fields.items():
            if not _config_classes(field.annotation):
                settings.append(_setting(self.config, name, field))
        return settings

    def subsections(self) -> Iterator[Section]:
        """Yield the sections below this one, in order, each followed by its own subsections.

        Interaction models are not among them: they have a section of their own.
        """
        for name, field in self.config.model_fields.items():
            classes = _config_classes(field.annotation)
            if not classes or issubclass(classes[0], BackboneConfig):
                continue

            path = self._path_below(name, field.annotation)
            notes = _notes(self.config, name, field)
            section = Section(path, classes[0], notes)
            yield section
            yield from section.subsections()

    def _path_below(self, name: str, annotation: object) -> str:
        path = f"{self.path}.{name}" if self.path else name
        container = get_origin(_without_none(annotation))
        if container is tuple:
            return f"{path}[]"
        if container is dict:
            return f"{path}.<name>"
        return path


def sections() -> list[Section]:
    """Return all sections of the config tree, the root first, without interaction models."""
    root = Section("", Config)
    return [root, *root.subsections()]


def models() -> list[Section]:
    """Return a section for each built-in interaction model."""
    model_field = FMConfig.model_fields["model"]
    model_sections = []
    for config in _config_classes(model_field.annotation):
        type_field = config.model_fields["type"]
        model_sections.append(Section(type_field.default, config))
    return model_sections


def reference() -> str:
    """Return the text of docs/configuration.md."""
    parts = [INTRODUCTION]
    for section in sections():
        title = "## Top level"
        if section.path:
            title = f"## `{section.path}`"
        settings = section.settings()
        parts += _section_lines(title, section, settings)

    parts += [f"## {MODEL_SECTION}", MODEL_INTRODUCTION]
    common = Section("", BackboneConfig).settings()
    parts.append(_table(common))
    common_names = [setting.name for setting in common]
    for model in models():
        settings = [setting for setting in model.settings() if setting.name not in common_names]
        parts += _section_lines(f"### `type: {model.path}`", model, settings)
    return "\n".join(parts)


def _section_lines(
    title: str,
    section: Section,
    settings: Sequence[Setting],
) -> list[str]:
    documentation = inspect.getdoc(section.config) or ""
    lines = [title, f"{documentation}\n"]
    if section.notes:
        lines.append(f"{section.notes}\n")
    if settings:
        lines.append(_table(settings))
    return lines


def _notes(
    config: type[FrozenModel],
    name: str,
    field: FieldInfo,
) -> str:
    """Describe an optional subsection, and its former names."""
    notes = []
    if not field.is_required() and field.get_default() is None:
        notes.append(f"Default: `null`. {field.description}")
    former_names = _former_names(config, name)
    if former_names:
        notes.append(f"Former name: {former_names}.")
    return " ".join(notes)


def _former_names(config: type[FrozenModel], name: str) -> str:
    former_names = []
    for former_name, current_name in config.old_names.items():
        if current_name == name:
            former_names.append(f"`{former_name}`")
    return ", ".join(former_names)


def _table(settings: Sequence[Setting]) -> str:
    lines = [
        "| setting | type | default | description |",
        "|---|---|---|---|",
        *(setting.row() for setting in settings),
    ]
    return "\n".join(lines) + "\n"


def _setting(
    config: type[FrozenModel],
    name: str,
    field: FieldInfo,
) -> Setting:
    description = field.description or ""
    former_names = _former_names(config, name)
    if former_names:
        description += f" Former name: {former_names}."

    default = "required"
    if not field.is_required():
        default = f"`{_yaml(field.get_default())}`"
    return Setting(
        name=field.alias or name,
        type=_type_in_words(field.annotation, field.metadata),
        default=default,
        description=description,
    )


def _yaml(value: object) -> str:
    """Write a default as it would stand in YAML."""
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, tuple | list):
        items = ", ".join(_yaml(item) for item in value)
        return f"[{items}]"
    return json.dumps(value)


def _type_in_words(annotation: object, metadata: Sequence[object] = ()) -> str:
    """Describe the values that an annotation allows."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return _annotated_in_words(arguments)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return _union_in_words(arguments, metadata)
    if origin is dict:
        return f"{{name: {_type_in_words(arguments[1])}}}"
    if origin is tuple:
        items = [_type_in_words(item) for item in arguments]
        return f"[{', '.join(items)}]"
    return PLAIN_TYPES.get(annotation, "text") + _bounds(metadata)


def _annotated_in_words(arguments: Sequence[Any]) -> str:
    """Describe an annotated type, whose constraints may be those of a field."""
    base, *annotations = arguments
    metadata: list[object] = []
    for annotation in annotations:
        if isinstance(annotation, FieldInfo):
            metadata += annotation.metadata
        else:
            metadata.append(annotation)
    return _type_in_words(base, metadata)


def _union_in_words(alternatives: Sequence[object], metadata: Sequence[object]) -> str:
    words = []
    for alternative in alternatives:
        if alternative == tuple[()]:  # a list that may be empty, beside the same list
            continue
        is_null = alternative is type(None)
        words.append(_type_in_words(alternative, () if is_null else metadata))
    if len(words) > MAX_ALTERNATIVES:
        return "value"
    return " or ".join(words)


def _bounds(metadata: Sequence[object]) -> str:
    """Describe the bounds of a number, such as ` >= 1`."""
    bounds = []
    for constraint in metadata:
        constraint_type = type(constraint)
        if constraint_type in BOUNDS:
            sign, attribute = BOUNDS[constraint_type]
            limit = getattr(constraint, attribute)
            bounds.append(f"{sign} {limit}")
    if not bounds:
        return ""
    return " " + ", ".join(bounds)


def _config_classes(annotation: Any) -> list[type[FrozenModel]]:
    """Return the config classes that an annotation contains, in order."""
    if isinstance(annotation, type) and issubclass(annotation, FrozenModel):
        return [annotation]
    classes: list[type[FrozenModel]] = []
    for argument in get_args(annotation):
        classes += _config_classes(argument)
    return classes


def _without_none(annotation: Any) -> Any:
    """Return the annotation of an optional setting without its None."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    alternatives = [value for value in get_args(annotation) if value is not type(None)]
    return alternatives[0]


if __name__ == "__main__":
    print(reference(), end="")
