"""The reference of the settings: complete, and in step with docs/configuration.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from exfm_ray.base import FrozenModel
from exfm_ray.config.models import MODEL_TYPES
from exfm_ray.config.reference import Section, models, reference, sections
from exfm_ray.config.root import Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def settings_of(config: type[FrozenModel], prefix: str = "") -> set[str]:
    """Return the dotted names in a dumped config."""
    return set(dotted(config().model_dump(mode="json", by_alias=True), prefix))


def dotted(tree: object, prefix: str) -> list[str]:
    if not isinstance(tree, dict) or not tree:
        return [prefix]
    names = []
    for key, value in tree.items():
        names += dotted(value, f"{prefix}.{key}" if prefix else str(key))
    return names


def test_the_page_is_up_to_date() -> None:
    """Wrong: a setting has changed and docs/configuration.md has not."""
    way_out = "run `python -m exfm_ray.config.reference > docs/configuration.md`"
    assert PAGE.read_text() == reference(), way_out


@pytest.mark.parametrize(
    "section", [*sections(), *models()], ids=lambda section: section.path or "root"
)
def test_every_setting_has_a_description(section: Section) -> None:
    """Wrong: a setting or section has no description, or one that is not a sentence."""
    assert section.config.__doc__
    for name, field in section.config.model_fields.items():
        description = field.description or ""
        assert len(description) > 10 and description.endswith("."), name
        assert not description[0].isspace() and "  " not in description, name


def test_the_page_lists_every_setting() -> None:
    """Wrong: a part of the config tree is missing from the page."""
    listed = set()
    for section in sections():
        for setting in section.settings():
            listed.add(f"{section.path}.{setting.name}".removeprefix("."))

    optional = {"data.follow", "fm.static", "tune"}
    lists = {"teachers", "vm.models"}
    model_settings = {name for name in settings_of(Config) if ".model." in name}
    assert settings_of(Config) - optional - lists - model_settings <= listed
    assert {"teachers[].run", "vm.models[].task", "tune.space.<name>.when"} <= listed
    assert [model.path for model in models()] == list(MODEL_TYPES)


@pytest.mark.parametrize(
    "row",
    [
        "| `batch_size` | integer >= 1 | `1024` |",
        "| `churn` | number >= 0, <= 1 | `0.02` |",
        "| `by` | `time` or `rows` or `file` | `time` |",
        "| `attribution_s` | {name: integer >= 0} | `{}` |",
        "| `calibration` | [number, number] | `[0.95, 1.05]` |",
        "| `published_arm` | arm or null | `null` |",
        "| `domain` | text | required |",
        "Former name: `reset_unused`. |",
        "Former name: `embedded`.\n",
    ],
)
def test_types_and_defaults_in_words(row: str) -> None:
    """Wrong: a type, bound, default or former name is missing or illegible."""
    assert row in reference()
